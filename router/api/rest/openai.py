"""OpenAI's routes: chat completions, completions, models."""

from time import time

from fastapi import APIRouter
from starlette.responses import Response

from router.api.rest import models_chat, models_completions
from router.api.rest import models_openai as m
from router.api.rest.asks import model_name
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect, error_response
from router.api.rest.openai_chat import ChatRoute
from router.api.rest.openai_completions import CompletionRoute
from router.api.rest.openai_shapes import Json
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.errors import RequestError
from router.fleet import ModelCard

ERRORS = error_answers(m.OpenAIError, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, context: Context) -> None:
        self.chat = ChatRoute(context).chat
        self.completions = CompletionRoute(context).completions
        self._fleet = context.fleet
        self._started = int(time())

    async def models(self) -> Response:
        """Lists the models, the default one first, and behind each its adapters."""
        data = [
            self._entry(model, name)
            for model in self._fleet.models()
            for name in ("", *model.adapters)
        ]
        return json_response({"object": "list", "data": data})

    async def model(self, model_id: str) -> Response:
        """Returns one model or adapter, by its name."""
        name = model_name(model_id)
        try:
            return json_response(self._entry(self._fleet.model(name), self._fleet.adapter(name)))
        except RequestError as error:
            return error_response(RequestError(error.fault, error.message, "model"), Dialect.OPENAI)

    def _entry(self, model: ModelCard, adapter: str = "") -> Json:
        entry = {"id": adapter or model.id, "object": "model", "created": self._started}
        parent = {"parent": model.id} if adapter else {}
        return {**entry, "owned_by": model.id, **parent}


def openai_routes(context: Context) -> APIRouter:
    """Returns the router with OpenAI's generating routes and its models."""
    routes = OpenAIRoutes(context)
    api = APIRouter(tags=["OpenAI"])
    for path, handler, body, whole, event in (
        (
            "/chat/completions",
            routes.chat,
            models_chat.ChatRequest,
            models_chat.ChatCompletion,
            models_chat.ChatCompletionChunk,
        ),
        (
            "/completions",
            routes.completions,
            models_completions.CompletionRequest,
            models_completions.Completion,
            models_completions.Completion,
        ),
    ):
        answers = {200: {"model": whole, **stream_answer(event)}, **ERRORS}
        api.post(f"/v1{path}", responses=answers, openapi_extra=request_body(body))(handler)
    api.get("/v1/models", responses={200: {"model": m.ModelList}})(routes.models)
    missing = error_answers(m.OpenAIError, 404, 503)
    one = {200: {"model": m.ModelEntry}, **missing, "default": {"model": m.OpenAIError}}
    api.get("/v1/models/{model_id:path}", responses=one)(routes.model)
    return api
