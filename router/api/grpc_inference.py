"""``router.v1.Inference``: each method translates, asks the service and translates back."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial

from router.api import grpc_convert as convert
from router.api.grpc_answers import Outgoing
from router.api.grpc_calls import (
    STREAM,
    UNARY,
    Context,
    Handler,
    Received,
    guarded,
    handler,
    opened,
    time_left_s,
)
from router.api.grpc_chat import chat_ask, field_name
from router.api.grpc_errors import renaming
from router.api.rest.collect import collect_all
from router.ask import Ask, Chunk
from router.auth import ApiKeys
from router.chat import ChatGeneration, ChatService
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import Fleet
from router.generation import Generation
from router.service import Service
from router.v1 import router_pb2 as pb
from router.validation import is_greedy

SERVICE = "router.v1.Inference"

Answer = Generation | ChatGeneration
Start = Callable[[], Awaitable[AbstractAsyncContextManager[Answer]]]
Write = Callable[[pb.GenerateResponse], Awaitable[None]]


class Inference:
    """The methods of the service. ``keys`` guards those that run a model or tokenise."""

    def __init__(
        self, service: Service, chats: ChatService, fleet: Fleet, keys: ApiKeys, settings: Settings
    ) -> None:
        self._service = service
        self._chats = chats
        self._fleet = fleet
        self._keys = keys
        self._settings = settings

    async def generate(self, request: Received[pb.GenerateRequest], context: Context) -> None:
        """Continues a prompt."""
        async with guarded(self._keys, request, context, self._service.refused) as known:
            ask = convert.generate_ask(known, time_left_s(context))
            params = known.parameters
            count = self._count(params)
            with _renaming(known):
                if known.best_of > 1:
                    await self._best(self._candidates(ask, known.best_of, count), params, context)
                    return
                asks = convert.fan_out(ask, count)
                await _run([partial(self._service.generate, one) for one in asks], params, context)

    async def chat(self, request: Received[pb.ChatRequest], context: Context) -> None:
        """Answers a conversation."""
        async with guarded(self._keys, request, context, self._service.refused) as known:
            params = known.parameters
            asks = convert.fan_out(chat_ask(known, time_left_s(context)), self._count(params))
            with _renaming(known):
                await _run([partial(self._chats.chat, one) for one in asks], params, context)

    async def embed(self, request: Received[pb.EmbedRequest], context: Context) -> pb.EmbedResponse:
        """Turns inputs into vectors."""
        async with guarded(self._keys, request, context) as known:
            ask = convert.embed_ask(known, time_left_s(context))
            return convert.embeddings_of(await self._service.embed(ask))
        raise AssertionError("either returned or aborted")

    async def tokenize(
        self, request: Received[pb.TokenizeRequest], context: Context
    ) -> pb.TokenizeResponse:
        """Turns text into token ids."""
        async with guarded(self._keys, request, context) as known:
            found = await self._service.tokenize(
                known.model or None, known.text, known.add_special_tokens
            )
            return pb.TokenizeResponse(tokens=convert.tokens_of(found))
        raise AssertionError("either returned or aborted")

    async def tokenize_chat(
        self, request: Received[pb.ChatRequest], context: Context
    ) -> pb.TokenizeChatResponse:
        """Turns a conversation into the token ids that a chat would start from."""
        async with guarded(self._keys, request, context) as known:
            with _renaming(known):
                card, text = await self._chats.render(chat_ask(known, None))
            found = await self._service.tokenize(card, text, False)
            return pb.TokenizeChatResponse(text=text, tokens=convert.tokens_of(found))
        raise AssertionError("either returned or aborted")

    async def detokenize(
        self, request: Received[pb.DetokenizeRequest], context: Context
    ) -> pb.DetokenizeResponse:
        """Turns token ids into text."""
        async with guarded(self._keys, request, context) as known:
            text = await self._service.detokenize(
                known.model or None, known.token_ids, known.skip_special_tokens
            )
            return pb.DetokenizeResponse(text=text)
        raise AssertionError("either returned or aborted")

    async def list_models(
        self, request: Received[pb.ListModelsRequest], context: Context
    ) -> pb.ListModelsResponse:
        """Lists the models of the fleet; needs no key, as on REST."""
        async with opened(request, context):
            models = [convert.model_of(card) for card in self._fleet.models()]
            return pb.ListModelsResponse(models=models)
        raise AssertionError("either returned or aborted")

    def _count(self, params: pb.Parameters) -> int:
        limit = self._settings.max_concurrent_requests
        if params.n > limit:
            text = f"`n` must be at most {limit}. Given: {params.n}"
            raise RequestError(Fault.VALIDATION, text, "n")
        return max(1, params.n)

    def _candidates(self, ask: Ask, best_of: int, count: int) -> tuple[list[Ask], int]:
        """The asks of which the best ``count`` are sent."""
        limit = self._settings.max_best_of
        fault = ""
        if not count <= best_of <= limit:
            fault = f"`best_of` must be >= {count} and <= {limit}. Given: {best_of}"
        elif is_greedy(ask.params):
            fault = "`best_of` needs a temperature above 0: greedy answers are all the same"
        if fault:
            raise RequestError(Fault.VALIDATION, fault, "best_of")
        ask = replace(ask, params=replace(ask.params, logprobs=True))
        return convert.fan_out(ask, best_of), count

    async def _best(
        self, candidates: tuple[list[Ask], int], params: pb.Parameters, context: Context
    ) -> None:
        """Writes the likeliest answers, once all candidates have ended."""
        asks, count = candidates
        answers = await collect_all(self._service, asks)
        answers.sort(key=lambda answer: -answer.mean_logprob)
        for choice, answer in enumerate(answers[:count]):
            chunk = Chunk(tuple(answer.tokens), answer.finish.text, answer.finish)
            await context.write(Outgoing(params, choice).take(chunk))

    def handlers(self) -> dict[str, Handler]:
        """The methods of the service."""
        most = self._settings.payload_limit
        answer = pb.GenerateResponse
        return {
            "Generate": handler(STREAM, self.generate, pb.GenerateRequest, answer, most),
            "Chat": handler(STREAM, self.chat, pb.ChatRequest, answer, most),
            "Embed": handler(UNARY, self.embed, pb.EmbedRequest, pb.EmbedResponse, most),
            "Tokenize": handler(
                UNARY, self.tokenize, pb.TokenizeRequest, pb.TokenizeResponse, most
            ),
            "TokenizeChat": handler(
                UNARY, self.tokenize_chat, pb.ChatRequest, pb.TokenizeChatResponse, most
            ),
            "Detokenize": handler(
                UNARY, self.detokenize, pb.DetokenizeRequest, pb.DetokenizeResponse, most
            ),
            "ListModels": handler(
                UNARY, self.list_models, pb.ListModelsRequest, pb.ListModelsResponse, most
            ),
        }


def _renaming(request: pb.GenerateRequest | pb.ChatRequest) -> AbstractContextManager[None]:
    """Errors from inside speak of what the prompt and the parameters are called here."""
    prompt = convert.prompt_field(request)
    names = {"prompt": prompt}.get
    return renaming(lambda field: names(field, field_name(field)), convert.words_of(prompt))


async def _run(starts: Sequence[Start], params: pb.Parameters, context: Context) -> None:
    """Writes all answers as they come. One failure ends the others.

    All are submitted before any is read: what is wrong with all of them is so refused once.
    """
    if len(starts) == 1:
        async with await starts[0]() as answer:
            await _write_answer(answer, Outgoing(params), context.write)
        return
    one_at_a_time = asyncio.Lock()  # grpcio takes one message of a call at once

    async def write(message: pb.GenerateResponse) -> None:
        async with one_at_a_time:
            await context.write(message)

    async with AsyncExitStack() as running:
        answers = [await running.enter_async_context(await start()) for start in starts]
        async with asyncio.TaskGroup() as group:
            for choice, answer in enumerate(answers):
                group.create_task(_write_answer(answer, Outgoing(params, choice), write))


async def _write_answer(answer: Answer, out: Outgoing, write: Write) -> None:
    try:
        async for chunk in answer:
            message = out.take(chunk)
            if message is not None:
                await write(message)
            if chunk.finish is not None:
                return
    except RequestError:
        rest = out.rest()
        if rest is not None:
            await write(rest)
        raise
