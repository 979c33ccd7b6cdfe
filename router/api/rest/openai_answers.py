"""How OpenAI's two generating routes answer: all at once, or as one stream of events."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response

from router.api.rest.body import ignored_header
from router.api.rest.collect import Start, Whole, WholeChat, compute_type, each, timing_headers
from router.api.rest.context import json_response
from router.api.rest.errors import Dialect
from router.api.rest.models_openai import SamplingFields
from router.api.rest.openai_shapes import DONE, Head, Json, usage
from router.api.rest.sse import EventStream, EventWriter
from router.ask import Chunk, Finish
from router.conversation import ChatChunk, ChatFinish
from router.fleet import ModelCard

C = TypeVar("C", Chunk, ChatChunk)
Events = Callable[[C], bytes]
"""Makes the event of a chunk of one choice; empty if it has nothing for the client."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request, understood. ``tries`` is how many answers are made for each prompt.

    ``silent`` says that what is generated is not part of the answers.
    """

    body: SamplingFields
    model: ModelCard
    head: Head
    tries: int
    characters: int
    silent: bool = False

    def usage(self, finishes: Sequence[Finish | ChatFinish]) -> Json:
        """Returns the token counts; a prompt counts once, however many answers it has."""
        chats = [finish for finish in finishes if isinstance(finish, ChatFinish)]
        bare = [one.finish if isinstance(one, ChatFinish) else one for one in finishes]
        counts = usage([] if self.silent else bare, bare[:: self.tries])
        if chats:
            thoughts = sum(chat.reasoning_tokens for chat in chats)
            counts["completion_tokens_details"] = {"reasoning_tokens": thoughts}
        return counts


def whole(
    job: Job, answers: Sequence[Whole], choices: Sequence[Json], arrived: float, **more: Any
) -> Response:
    """Returns all answers at once. ``answers`` are all that were made, also those not returned."""
    finishes = [
        answer.chat if isinstance(answer, WholeChat) else answer.finish for answer in answers
    ]
    counts = job.usage(finishes)
    value = {**job.head.fields, "choices": choices, "usage": counts, **more}
    headers = timing_headers(arrived, answers, job.characters, job.model)
    return json_response(value, headers | ignored_header(job.body))


def stream(
    job: Job, starts: Sequence[Start[AsyncIterator[C]]], choices: Sequence[Events[C]]
) -> Response:
    """Returns the events of all answers, each as it comes."""

    async def produce(writer: EventWriter) -> bytes:
        finishes = await each(starts, [partial(_pump, writer, one) for one in choices])
        if not job.head.counted:
            return DONE
        return job.head.event([], job.usage(finishes)) + DONE

    headers = {
        "x-compute-type": compute_type(job.model),
        "x-compute-characters": str(job.characters),
    }
    return EventStream(produce, Dialect.OPENAI, headers | ignored_header(job.body))


async def _pump(
    writer: EventWriter, events_of: Events[C], answer: AsyncIterator[C]
) -> Finish | ChatFinish:
    """Writes the events of one answer, to its end."""
    async for chunk in answer:
        events = events_of(chunk)
        if events:
            await writer.write(events)
        if chunk.finish is not None:
            return chunk.finish
    raise AssertionError("an answer ends with a finish or an error")
