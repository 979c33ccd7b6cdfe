"""OpenAI's chat completions."""

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from router.api.rest import chat_shapes as shapes
from router.api.rest.asks import fan_out
from router.api.rest.chat import chat_ask
from router.api.rest.collect import collect_chats
from router.api.rest.context import Context
from router.api.rest.errors import Dialect
from router.api.rest.models_chat import ChatRequest
from router.api.rest.openai_answers import Job, stream, whole
from router.api.rest.openai_shapes import Head, prompt_logprobs
from router.api.rest.refusals import refuse_unsupported
from router.chat import ChatGeneration
from router.conversation import ChatAsk
from router.errors import RequestError

WHOLE, EVENT = "chat.completion", "chat.completion.chunk"


class ChatRoute:
    """The handler."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, whole or as events."""
        return await self._context.answer(request, ChatRequest, Dialect.OPENAI, self.answer)

    async def answer(self, body: ChatRequest, arrived: float) -> Response:
        """Answers a checked body. Raises RequestError."""
        context = self._context
        refuse_unsupported(body)
        ask, choice = chat_ask(body, context.settings, context.fleet)
        model = context.fleet.model(ask.model)
        kind = EVENT if body.stream else WHOLE
        head = Head("chatcmpl", kind, ask.adapter or model.id, body, model)
        job = Job(body, model, head, body.n or 1, characters_of(body))
        asks = fan_out(ask, job.tries)
        style = shapes.Style.of(body, choice.legacy, model.tokenizer.token_bytes)
        if body.stream:
            events = [shapes.ChatEvents(head, index, style) for index in range(job.tries)]
            begins = [partial(self._begin, *pair) for pair in zip(asks, events, strict=True)]
            return stream(job, begins, [one.of for one in events])
        answers = await collect_chats([partial(self._start, ask) for ask in asks])
        choices = [shapes.chat_choice(index, answer, style) for index, answer in enumerate(answers)]
        more: dict[str, Any] = {} if body.metadata is None else {"metadata": body.metadata}
        if body.prompt_logprobs is not None:
            prompt = answers[0].finish.prompt
            more["prompt_logprobs"] = prompt_logprobs(prompt, body.prompt_logprobs)
        if body.return_token_ids:
            more["prompt_token_ids"] = answers[0].prompt_ids
        return whole(job, answers, choices, arrived, **more)

    async def _begin(self, ask: ChatAsk, events: shapes.ChatEvents) -> ChatGeneration:
        answer = await self._start(ask)
        events.begin(answer)
        return answer

    async def _start(self, ask: ChatAsk) -> ChatGeneration:
        """Submits one chat. What the service calls a prompt are the client's messages."""
        try:
            return await self._context.chat.chat(ask)
        except RequestError as error:
            error.message = error.message.replace("`inputs`", "`messages`")
            error.field = "messages" if error.field == "prompt" else error.field
            raise


def characters_of(body: ChatRequest) -> int:
    """Returns how much text the messages have."""
    contents = (message.content or "" for message in body.messages)
    return sum(
        len(content)
        if isinstance(content, str)
        else sum(len(text) for part in content if isinstance(text := part.get("text"), str))
        for content in contents
    )
