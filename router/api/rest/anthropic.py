"""Anthropic's routes: messages, and how many tokens they have."""

from collections.abc import Mapping

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import models_anthropic as m
from router.api.rest.anthropic_asks import asks_for_cache, chat_ask, ignored
from router.api.rest.anthropic_shapes import Blocks, Json, MessageEvents, Style, whole_message
from router.api.rest.body import ignored_header
from router.api.rest.context import Context, json_response
from router.api.rest.errors import Dialect
from router.api.rest.openapi import error_answers, request_body, stream_answer
from router.api.rest.request_id import ANTHROPIC_PATH as PATH
from router.api.rest.sse import EventStream, EventWriter
from router.conversation import ChatAsk

ERRORS = error_answers(m.AnthropicError, 400, 401, 404, 408, 413, 415, 500, 503, 504, 529)


class AnthropicRoutes:
    """The handlers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def messages(self, request: Request) -> Response:
        """Answers a conversation, whole or as events."""
        return await self._context.answer(
            request, m.MessagesRequest, Dialect.ANTHROPIC, self._answer
        )

    async def count(self, request: Request) -> Response:
        """Says how many tokens a conversation has as a prompt, tools included."""
        return await self._context.answer(
            request, m.CountRequest, Dialect.ANTHROPIC, self._count, generates=False
        )

    async def _answer(self, body: m.MessagesRequest, _arrived: float) -> Response:
        context = self._context
        ask = chat_ask(body, context.fleet, context.settings)
        style = Style(
            model=ask.adapter or context.fleet.model(ask.model).id,
            tier="priority" if ask.priority == 0 else "standard",
            caches=asks_for_cache(body),
            hushed=body.thinking is not None and body.thinking.display == "omitted",
        )
        headers = ignored_header(body, *ignored(body, ask))
        if body.stream:
            return self._stream(ask, style, headers)
        return json_response(await self._whole(ask, style), headers)

    async def _whole(self, ask: ChatAsk, style: Style) -> Json:
        blocks = Blocks(style)
        async with await self._context.chat.chat(ask) as answer:
            async for chunk in answer:
                for _ in blocks.push(chunk):
                    pass  # of interest to streams
                if chunk.finish is not None:
                    return whole_message(style, blocks, chunk.finish)
        raise AssertionError("an answer ends with a finish or an error")

    def _stream(self, ask: ChatAsk, style: Style, headers: Mapping[str, str]) -> Response:
        async def produce(writer: EventWriter) -> bytes:
            async with await self._context.chat.chat(ask) as answer:
                events_of = MessageEvents(style, answer.prompt_tokens).of
                async for chunk in answer:
                    events = events_of(chunk)
                    if chunk.finish is not None:
                        return events
                    if events:
                        await writer.write(events)
            raise AssertionError("an answer ends with a finish or an error")

        return EventStream(produce, Dialect.ANTHROPIC, headers)

    async def _count(self, body: m.CountRequest, _arrived: float) -> Response:
        context = self._context
        ask = chat_ask(body, context.fleet, context.settings)
        model, prompt = await context.chat.render(ask)
        tokens = await context.service.tokenize(model, prompt, add_special_tokens=False)
        headers = ignored_header(body, *ignored(body, ask))
        return json_response({"input_tokens": len(tokens)}, headers)


def anthropic_routes(context: Context) -> APIRouter:
    """Returns the router with Anthropic's routes."""
    routes = AnthropicRoutes(context)
    api = APIRouter(tags=["Anthropic"])
    answers = {200: {"model": m.AnthropicMessage, **stream_answer(m.AnthropicEvent)}, **ERRORS}
    body = request_body(m.MessagesRequest)
    api.post(PATH, responses=answers, openapi_extra=body)(routes.messages)
    counted = {200: {"model": m.TokenCount}, **ERRORS}
    body = request_body(m.CountRequest)
    api.post(f"{PATH}/count_tokens", responses=counted, openapi_extra=body)(routes.count)
    return api
