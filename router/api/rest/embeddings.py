"""OpenAI's route for embeddings."""

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import models_completions as m
from router.api.rest.asks import model_name, unsupported
from router.api.rest.body import ignored_header
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect
from router.api.rest.models_openai import OpenAIError
from router.api.rest.openapi import error_answers, request_body
from router.ask import EmbedAsk

ERRORS = error_answers(OpenAIError, 400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


def inputs_of(body: m.EmbeddingRequest) -> tuple[str | tuple[int, ...], ...]:
    """Returns the inputs, each as text or token ids. Raises RequestError."""
    given: Any = body.input
    many = isinstance(given, list) and not (given and isinstance(given[0], int))
    return tuple(
        one if isinstance(one, str) else tuple(one) for one in (given if many else [given])
    )


def shape(vector: Sequence[float], base64: bool) -> list[float] | str:
    """Returns a vector as JSON holds it."""
    if not base64:
        return list(vector)
    floats = array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return b64encode(floats.tobytes()).decode()


class EmbeddingRoutes:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def embeddings(self, request: Request) -> Response:
        """Turns texts or token ids into vectors of length 1."""
        return await self._context.answer(
            request, m.EmbeddingRequest, Dialect.OPENAI, self._embeddings
        )

    async def _embeddings(self, body: m.EmbeddingRequest, _: float) -> Response:
        ask = EmbedAsk(inputs_of(body), model_name(body.model))
        found = await self._context.service.embed(ask)
        size = len(found.vectors[0])
        if body.dimensions not in (None, size):
            text = f"vectors of {found.model} have {size}, and cannot be cut; leave it out"
            raise unsupported("dimensions", text)
        base64 = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": shape(vector, base64)}
            for index, vector in enumerate(found.vectors)
        ]
        count = found.prompt_tokens
        usage = {"prompt_tokens": count, "total_tokens": count}
        value = {"object": "list", "data": data, "model": found.model, "usage": usage}
        return json_response(value, ignored_header(body))


def embedding_routes(context: Context) -> APIRouter:
    """Returns the router with OpenAI's route for embeddings."""
    api = APIRouter(tags=["OpenAI"])
    answers = {200: {"model": m.EmbeddingList}, **ERRORS}
    handler = EmbeddingRoutes(context).embeddings
    body = request_body(m.EmbeddingRequest)
    api.post("/v1/embeddings", responses=answers, openapi_extra=body)(handler)
    return api
