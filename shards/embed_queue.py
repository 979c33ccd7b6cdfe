"""Embeddings beside the log of plans: of the batches that wait, one stands in the engine's line.

The line of the engine thread is first come, first served. As the next batch joins it only when the
one before is done, plans that came meanwhile are before it: between two plans there is never more
than one batch, however many wait. Calls send their batches one after the other, so a long call
takes turns with the others. A batch that the engine does in turns stands in the line anew for each.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shards.engines.base import EngineLost, Vectors

# Batches that may wait, one for each call.
WAITING_MAX = 128


class BusyError(Exception):
    """Too many calls wait already; the text is one line."""


@dataclass(eq=False)
class EmbedJob:
    """One batch. The loop owns it; the engine thread reads ``inputs`` and ``over`` only.

    ``turns`` is the engine thread's own.
    """

    inputs: Sequence[Sequence[int]]
    done: asyncio.Future[Vectors]
    over: bool = False
    turns: Iterator[Vectors | None] | None = None


class EmbedQueue:
    """All methods are called on the loop. ``enter`` puts a job into the engine's line.

    It raises ``BusyError`` if there is no place in it.
    """

    def __init__(self, enter: Callable[[EmbedJob], None]) -> None:
        self._enter = enter
        self._waiting: deque[EmbedJob] = deque()
        self._current: EmbedJob | None = None
        self._lost = ""

    async def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        """Waits for the vectors of one batch. Cancelled, it leaves the queue.

        Raises ``BusyError``, and what ``Engine.embed`` raises.
        """
        if self._lost:
            raise EngineLost(self._lost)
        if len(self._waiting) >= WAITING_MAX:
            raise BusyError(f"{WAITING_MAX} calls wait for embeddings already; try again later")
        job = EmbedJob(inputs, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._next()
        try:
            return await job.done
        finally:
            job.over = True

    def answered(self, job: EmbedJob, answer: Vectors | Exception | None) -> None:
        """The engine has come to the job; None if it was over by then. The next one follows."""
        assert job is self._current
        self._current = None
        if isinstance(answer, Exception):
            _fail(job, answer)
        elif answer is not None and not job.done.done():
            job.done.set_result(answer)
        self._next()

    def lose(self, message: str) -> None:
        """The engine is lost: nothing that waits will be answered."""
        self._lost = message
        for job in (*self._waiting, *filter(None, (self._current,))):
            _fail(job, EngineLost(message))
        self._waiting.clear()

    def _next(self) -> None:
        while self._waiting and self._current is None:
            job = self._waiting.popleft()
            if job.over:
                continue
            try:
                self._enter(job)
            except BusyError as error:
                _fail(job, error)
            else:
                self._current = job


def _fail(job: EmbedJob, error: Exception) -> None:
    if not job.done.done():
        job.done.set_exception(error)
