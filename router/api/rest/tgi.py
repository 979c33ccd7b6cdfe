"""TGI's routes: text-generation-inference 3.3, router/src/server.rs."""

from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import models_tgi as m
from router.api.rest import tgi_shapes as shapes
from router.api.rest.asks import invalid, model_name
from router.api.rest.body import ignored_header
from router.api.rest.chat import chat_ask
from router.api.rest.collect import collect_all, compute_type, timing_headers
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect, error_response
from router.api.rest.models_chat import ChatRequest
from router.api.rest.native_asks import native_asks, wants_details
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.sse import EventStream, EventWriter
from router.errors import RequestError

Handler = Callable[[Request], Awaitable[Response]]
ERRORS = error_answers(m.ErrorResponse, 400, 401, 404, 408, 413, 415, 422, 424, 429, 500, 503, 504)


def version() -> str:
    """Returns the version of this distribution, or 0 in a tree that is not installed."""
    try:
        return package_version("roundhouse-llm")
    except PackageNotFoundError:
        return "0"


class TgiRoutes:
    """The handlers; each parses, asks the service and shapes the answer."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def generate(self, request: Request) -> Response:
        """Continues a prompt and returns the whole answer."""

        async def work(body: m.GenerateRequest, arrived: float) -> Response:
            return await self._whole(body, arrived, as_list=False)

        return await self._context.answer(request, m.GenerateRequest, Dialect.TGI, work)

    async def generate_stream(self, request: Request) -> Response:
        """Continues a prompt and returns an event for each token."""

        async def work(body: m.GenerateRequest, _: float) -> Response:
            return self._stream(body)

        return await self._context.answer(request, m.GenerateRequest, Dialect.TGI, work)

    async def compat(self, request: Request) -> Response:
        """Continues a prompt: a list with one answer, or events if `stream` is true."""

        async def work(body: m.CompatGenerateRequest, arrived: float) -> Response:
            body.parameters = body.parameters or m.GenerateParameters(do_sample=True)
            if body.parameters.return_full_text is None:
                body.parameters.return_full_text = True
            return (
                self._stream(body)
                if body.stream
                else await self._whole(body, arrived, as_list=True)
            )

        return await self._context.answer(request, m.CompatGenerateRequest, Dialect.TGI, work)

    async def _whole(self, body: m.GenerateRequest, arrived: float, as_list: bool) -> Response:
        context = self._context
        model = context.fleet.model(model_name(body.model))
        asks = native_asks(body, context.settings, model, stream=False)
        answers = await collect_all(context.service, asks)
        given = body.parameters or m.GenerateParameters()
        prefix = body.inputs if given.return_full_text else ""
        is_special = model.tokenizer.is_special
        value = shapes.whole(answers, prefix, wants_details(given), is_special)
        headers = timing_headers(arrived, answers, len(body.inputs), model)
        return json_response([value] if as_list else value, headers | ignored_header(body))

    def _stream(self, body: m.GenerateRequest) -> Response:
        context = self._context
        model = context.fleet.model(model_name(body.model))
        (ask,) = native_asks(body, context.settings, model, stream=True)
        given = body.parameters or m.GenerateParameters()
        prefix = body.inputs if given.return_full_text else ""
        events = shapes.Events(prefix, given.details, model.tokenizer.is_special)

        async def produce(writer: EventWriter) -> bytes:
            async with await context.service.generate(ask) as answer:
                return await events.write(answer, writer)

        headers = {
            "x-compute-type": compute_type(model),
            "x-compute-characters": str(len(body.inputs)),
        }
        return EventStream(produce, Dialect.TGI, headers | ignored_header(body))

    async def tokenize(self, request: Request) -> Response:
        """Returns the tokens of a prompt; parameters are ignored."""

        async def work(body: m.GenerateRequest, _: float) -> Response:
            if not body.inputs:
                raise invalid("`inputs` cannot be empty", "inputs")
            model = self._context.fleet.model(model_name(body.model))
            found = await self._context.service.tokenize(model, body.inputs)
            return json_response(shapes.simple_tokens(body.inputs, found), ignored_header(body))

        return await self._context.answer(
            request, m.GenerateRequest, Dialect.TGI, work, generates=False
        )

    async def chat_tokenize(self, request: Request) -> Response:
        """Returns what the chat template makes of a conversation, and its tokens."""

        async def work(body: ChatRequest, _: float) -> Response:
            context = self._context
            ask = chat_ask(body, context.settings, context.fleet)[0]
            model, text = await context.chat.render(ask)
            found = await context.service.tokenize(model, text, add_special_tokens=False)
            tokens = shapes.simple_tokens(text, found)
            value = {"tokenize_response": tokens, "templated_text": text}
            return json_response(value, ignored_header(body))

        return await self._context.answer(request, ChatRequest, Dialect.TGI, work, generates=False)

    async def info(self) -> Response:
        """Returns the default model and the limits of this router."""
        try:
            model = self._context.fleet.model(None)
        except RequestError as error:
            return error_response(error, Dialect.TGI)
        return json_response(shapes.info(model, self._context.settings, version()))

    async def health(self) -> Response:
        """Answers 200 when some model can take requests, 503 when none can. Load plays no part."""
        if self._context.fleet.healthy:
            return Response(status_code=200)
        value = {"error": "unhealthy", "error_type": "healthcheck"}
        answer = json_response(value)
        answer.status_code = 503
        return answer

    async def metrics(self) -> Response:
        """Returns the metrics of this process in Prometheus' text format."""
        media = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self._context.metrics.render(), media_type=media)


def tgi_routes(context: Context) -> APIRouter:
    """Returns the router with all of TGI's routes."""
    routes = TgiRoutes(context)
    api = APIRouter(tags=["Text Generation Inference"])
    stream = stream_answer(m.StreamResponse)
    compat = {"model": list[m.GenerateResponse], **stream}
    posts: tuple[tuple[str, Handler, type[BaseModel], dict[str, Any]], ...] = (
        ("/generate", routes.generate, m.GenerateRequest, {"model": m.GenerateResponse}),
        ("/generate_stream", routes.generate_stream, m.GenerateRequest, stream),
        ("/", routes.compat, m.CompatGenerateRequest, compat),
        ("/tokenize", routes.tokenize, m.GenerateRequest, {"model": list[m.SimpleToken]}),
        ("/chat_tokenize", routes.chat_tokenize, ChatRequest, {"model": m.ChatTokenizeResponse}),
    )
    for path, handler, body, answer in posts:
        api.post(path, responses={200: answer, **ERRORS}, openapi_extra=request_body(body))(handler)
    unhealthy = error_answers(m.ErrorResponse, 503)
    for path in ("/health", "/ping", "/"):
        api.get(path, responses=unhealthy, response_class=Response)(routes.health)
    api.get("/info", responses={200: {"model": m.Info}, **unhealthy})(routes.info)
    api.get("/metrics", response_class=Response)(routes.metrics)
    return api
