"""Running asks to their end, one or several at once, and what there is to say about the time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from router.ask import Ask, Finish, TokenOut
from router.chat import ChatGeneration
from router.conversation import ChatFinish
from router.fleet import ModelCard
from router.generation import Generation
from router.service import Service

G = TypeVar("G")
W = TypeVar("W")

Start = Callable[[], Awaitable[AbstractAsyncContextManager[G]]]
"""Submits an answer; leaving the context before its end cancels it. Raises RequestError."""
Read = Callable[[G], Coroutine[Any, Any, W]]
"""Reads an answer to its end. Raises RequestError if it breaks off."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer, and when (perf_counter, in seconds) it was submitted and ended."""

    tokens: list[TokenOut]
    finish: Finish
    submitted: float
    ended: float
    prompt_ids: Sequence[int] = field(default=(), kw_only=True)

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of the tokens, by which TGI chooses the best of several."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else float("-inf")


@dataclass(frozen=True, slots=True)
class WholeChat(Whole):
    """A complete chat answer; ``chat`` is what its text was read as."""

    chat: ChatFinish


async def collect_all(service: Service, asks: Sequence[Ask]) -> list[Whole]:
    """Runs asks to their ends, as ``each`` does. Raises as it does."""
    return await each([partial(service.generate, ask) for ask in asks], [_whole] * len(asks))


async def collect_chats(starts: Sequence[Start[ChatGeneration]]) -> list[WholeChat]:
    """Runs the chats that ``starts`` submit to their ends. Raises as ``each``."""
    return await each(starts, [_whole_chat] * len(starts))


async def _whole(answer: Generation) -> Whole:
    tokens: list[TokenOut] = []
    submitted = perf_counter()
    async for chunk in answer:
        tokens.extend(chunk.tokens)
        if chunk.finish is not None:
            ids, ended = answer.prompt_ids, perf_counter()
            return Whole(tokens, chunk.finish, submitted, ended, prompt_ids=ids)
    raise AssertionError("an answer ends with a finish or an error")


async def _whole_chat(answer: ChatGeneration) -> WholeChat:
    tokens: list[TokenOut] = []
    submitted = perf_counter()
    async for chunk in answer:
        tokens.extend(chunk.tokens)
        if (chat := chunk.finish) is not None:
            ids, times = answer.prompt_ids, (submitted, perf_counter())
            return WholeChat(tokens, chat.finish, *times, chat, prompt_ids=ids)
    raise AssertionError("an answer ends with a finish or an error")


async def each(starts: Sequence[Start[G]], reads: Sequence[Read[G, W]]) -> list[W]:
    """Submits one answer after the other, then reads all at once, as ``together`` does.

    What they have in common is so refused once, and not once for each, before any is read. Raises
    as ``together``; whatever ends it, no answer is left running.
    """
    async with AsyncExitStack() as running:
        answers = [await running.enter_async_context(await start()) for start in starts]
        return await together([read(one) for read, one in zip(reads, answers, strict=True)])


async def together(works: Sequence[Coroutine[Any, Any, W]]) -> list[W]:
    """Runs all at once; results come in their order. One failure cancels the others.

    Raises RequestError, within an ExceptionGroup if there are several.
    """
    if len(works) == 1:
        return [await works[0]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
    return [task.result() for task in tasks]


def compute_type(model: ModelCard) -> str:
    """Returns TGI's ``<ranks>-<device>`` for the model's first group."""
    if not model.groups:
        return "none"
    group = model.groups[0]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{group.world}-{group.device}")


def timing_headers(
    arrived: float, answers: Sequence[Whole], characters: int, model: ModelCard
) -> dict[str, str]:
    """Returns TGI's headers (router/src/server.rs, `generate_internal`).

    Times are in milliseconds, x-compute-time in seconds. The queue ends with the first plan that
    has the request; of several answers the longest wait counts.
    """
    ended = max(answer.ended for answer in answers)
    submitted = max(answer.submitted for answer in answers)
    queued = max(answer.finish.queued_ms for answer in answers) / 1000
    inference = ended - submitted - queued
    generated = sum(answer.finish.generated_tokens for answer in answers)

    def ms(seconds: float) -> str:
        return str(max(0, round(seconds * 1000)))

    return {
        "x-compute-type": compute_type(model),
        "x-compute-time": f"{ended - arrived:.6f}",
        "x-compute-characters": str(characters),
        "x-total-time": ms(ended - arrived),
        "x-validation-time": ms(submitted - arrived),
        "x-queue-time": ms(queued),
        "x-inference-time": ms(inference),
        "x-time-per-token": ms(inference / max(1, generated)),
        "x-prompt-tokens": str(sum(answer.finish.prompt_tokens for answer in answers)),
        "x-generated-tokens": str(generated),
    }
