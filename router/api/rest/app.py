"""The REST application: all routes, error pages, CORS and documentation."""

from collections.abc import Awaitable, Callable
from functools import lru_cache

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from router.api.rest import (
    models_anthropic,
    models_chat,
    models_completions,
    models_responses,
    models_tgi,
)
from router.api.rest.anthropic import anthropic_routes
from router.api.rest.context import Context
from router.api.rest.embeddings import embedding_routes
from router.api.rest.errors import Dialect, HttpError, error_response
from router.api.rest.hosted import hosted_routes
from router.api.rest.openai import openai_routes
from router.api.rest.openapi import docs_page, install_openapi
from router.api.rest.request_id import ANTHROPIC_PATH, naming
from router.api.rest.responses import responses_routes
from router.api.rest.sse import SERVER_SEND, known_fault
from router.api.rest.straight import Straight
from router.api.rest.tgi import tgi_routes, version
from router.auth import ApiKeys
from router.chat import ChatService
from router.config import Settings
from router.fleet import Fleet
from router.metrics import Metrics
from router.service import Service
from router.tracing import OFF, Tracing

DESCRIPTION = "Text generation: the interfaces of TGI, OpenAI and Anthropic."


class _App(FastAPI):
    """Remembers the server's ``send`` for streams, see ``EventWriter``; names every answer.

    What can be got can be asked for by HEAD, as in TGI; the server leaves the body out.
    """

    tracing = OFF

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        routed = {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope
        routed[SERVER_SEND] = send
        with self.tracing.rest(scope) as call:
            await super().__call__(routed, receive, call.sending(naming(routed, send)))


def create_app(
    service: Service,
    fleet: Fleet,
    metrics: Metrics,
    settings: Settings,
    tracing: Tracing = OFF,
) -> FastAPI:
    """Returns the ASGI application that serves REST. It holds no state of its own."""
    app = _App(
        title="Roundhouse",
        version=version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name http, also behind a proxy that speaks TLS
    )
    app.tracing = tracing
    keys = ApiKeys(settings.api_key)
    context = Context(service, fleet, metrics, settings, keys, ChatService(service))
    groups = (
        tgi_routes(context),
        hosted_routes(context),
        openai_routes(context),
        responses_routes(context),
        embedding_routes(context),
        anthropic_routes(context),
    )
    for group in groups:
        app.include_router(group)
    app.add_middleware(Straight, routes=[route for group in groups for route in group.routes])
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_allow_origin) or ["*"],
        allow_methods=["GET", "POST"],
        # The SDKs of OpenAI and Anthropic send a dozen headers of their own from browsers, too.
        allow_headers=["*"],
        expose_headers=["x-ignored-parameters", "retry-after", "x-request-id", "request-id"],
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    install_openapi(
        app,
        (
            models_tgi.GenerateRequest,
            models_tgi.CompatGenerateRequest,
            models_tgi.StreamResponse,
            models_tgi.VertexRequest,
            models_chat.ChatRequest,
            models_completions.CompletionRequest,
            models_completions.EmbeddingRequest,
            models_chat.ChatCompletionChunk,
            models_completions.Completion,
            models_responses.ResponsesRequest,
            models_responses.ResponseEvent,
            *models_anthropic.DOCUMENTED,
        ),
    )
    app.get("/docs", include_in_schema=False)(_docs(app))
    app.get("/api-doc/openapi.json", include_in_schema=False)(_document(app))  # where TGI has it
    return app


def _docs(app: FastAPI) -> Callable[[], Awaitable[Response]]:
    page = lru_cache(maxsize=1)(lambda: docs_page(app.openapi()))

    async def docs() -> Response:
        return HTMLResponse(page())

    return docs


def _document(app: FastAPI) -> Callable[[], Awaitable[Response]]:
    async def document() -> Response:
        return JSONResponse(app.openapi())

    return document


def _dialect(request: Request) -> Dialect:
    path = request.url.path
    if path.startswith(ANTHROPIC_PATH):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI if path.startswith("/v1/") else Dialect.TGI


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers what the framework refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:200]
    response = error_response(
        HttpError(error.status_code, f"{method} {path}: {error.detail}"),
        _dialect(request),
        request.scope,
    )
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _bug(request: Request, error: Exception) -> Response:
    return error_response(known_fault(error), _dialect(request), request.scope)
