"""Running asks to their end, one or several at once, and what there is to say about the time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from router.ask import Ask, Finish, TokenOut
from router.chat import ChatGeneration
from router.conversation import ChatFinish
from router.fleet import ModelCard
from router.service import Service

W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer, and when (perf_counter, in seconds) it was submitted, began and ended."""

    tokens: list[TokenOut]
    finish: Finish
    submitted: float
    first: float
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


async def collect(service: Service, ask: Ask) -> Whole:
    """Runs one ask. Raises RequestError if it is refused or breaks off."""
    tokens: list[TokenOut] = []
    first = 0.0
    async with await service.generate(ask) as answer:
        submitted = perf_counter()
        async for chunk in answer:
            first = first or perf_counter()
            tokens.extend(chunk.tokens)
            if chunk.finish is not None:
                ids, ended = answer.prompt_ids, perf_counter()
                return Whole(tokens, chunk.finish, submitted, first, ended, prompt_ids=ids)
    raise AssertionError("an answer ends with a finish or an error")


async def collect_chat(start: Callable[[], Awaitable[ChatGeneration]]) -> WholeChat:
    """Runs the chat that ``start`` submits. Raises RequestError if it is refused or breaks off."""
    tokens: list[TokenOut] = []
    first = 0.0
    async with await start() as answer:
        submitted = perf_counter()
        async for chunk in answer:
            first = first or perf_counter()
            tokens.extend(chunk.tokens)
            if (chat := chunk.finish) is not None:
                ids, times = answer.prompt_ids, (submitted, first, perf_counter())
                return WholeChat(tokens, chat.finish, *times, chat, prompt_ids=ids)
    raise AssertionError("an answer ends with a finish or an error")


async def collect_all(service: Service, asks: Sequence[Ask]) -> list[Whole]:
    """Runs all at once, as ``together`` does."""
    return await together([collect(service, ask) for ask in asks])


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

    Times are in milliseconds, x-compute-time in seconds. The queue time here is the wait for the
    first token: the queue, and the prompt's computation, which shares its steps with others.
    """
    ended = max(answer.ended for answer in answers)
    submitted = max(answer.submitted for answer in answers)
    first = max(answer.first for answer in answers)
    generated = sum(answer.finish.generated_tokens for answer in answers)

    def ms(seconds: float) -> str:
        return str(max(0, round(seconds * 1000)))

    return {
        "x-compute-type": compute_type(model),
        "x-compute-time": f"{ended - arrived:.6f}",
        "x-compute-characters": str(characters),
        "x-total-time": ms(ended - arrived),
        "x-validation-time": ms(submitted - arrived),
        "x-queue-time": ms(first - submitted),
        "x-inference-time": ms(ended - first),
        "x-time-per-token": ms((ended - submitted) / max(1, generated)),
        "x-prompt-tokens": str(sum(answer.finish.prompt_tokens for answer in answers)),
        "x-generated-tokens": str(generated),
    }
