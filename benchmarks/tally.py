"""What both load generators share: the requests left to send, and what came back."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import uvloop

from benchmarks.jobs import Job, Seen, raise_file_limit, read_job, write_seen

ERRORS_KEPT = 5
Client = Callable[[], Coroutine[Any, Any, None]]


class Trace:
    """One request: when it left, when something arrived, and how many messages that were."""

    __slots__ = ("arrivals", "events", "sent_s")

    def __init__(self) -> None:
        self.sent_s = time.perf_counter()
        self.arrivals: list[float] = []
        self.events = 0


class Tally:
    """Hands out requests and collects what became of them."""

    def __init__(self, job: Job, requests: list[bytes]) -> None:
        self.job = job
        self._left: Iterator[bytes] = iter(requests)
        self._requests = len(requests)
        self._ended = 0
        self._traces: list[tuple[Trace, float]] = []
        self._tokens = 0
        self._cached = 0
        self._errors: list[str] = []
        self._error_count = 0

    def next(self) -> bytes | None:
        """The next request to send, or None if all have been sent."""
        return next(self._left, None)

    def answered(self, trace: Trace, tokens: int, cached: int) -> None:
        """A request was answered in full; the counts are the server's."""
        self._traces.append((trace, time.perf_counter()))
        self._tokens += tokens
        self._cached += cached
        self._ended += 1
        if tokens != self.job.tokens:
            self._note(f"asked for {self.job.tokens} tokens, got {tokens}")

    def failed(self, message: str) -> None:
        """A request ended in any other way."""
        self._ended += 1
        self._note(message)

    def _note(self, message: str) -> None:
        self._error_count += 1
        if len(self._errors) < ERRORS_KEPT:
            self._errors.append(message)

    async def run(self, clients: list[Client]) -> Seen:
        """Runs the clients until no request is left, at most for the job's deadline."""
        wall, cpu = time.perf_counter(), time.process_time()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.job.deadline_s), asyncio.TaskGroup() as group:
                for client in clients:
                    group.create_task(client())
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if unanswered := self._requests - self._ended:
            self._note(f"{unanswered} requests not answered after {wall:.0f} s")
            self._error_count += unanswered - 1
        return self._seen(wall, cpu)

    def _seen(self, wall_s: float, cpu_s: float) -> Seen:
        first, total, gaps, events = [], [], [], 0
        for trace, ended_s in self._traces:
            events += trace.events
            total.append(ended_s - trace.sent_s)
            times = trace.arrivals
            if times:
                first.append(times[0] - trace.sent_s)
                gaps += [after - before for before, after in pairwise(times)]
        return Seen(
            wall_s=wall_s,
            cpu_s=cpu_s,
            tokens=self._tokens,
            events=events,
            requests=self._requests,
            first_s=first,
            total_s=total,
            gaps_s=gaps,
            cached_tokens=self._cached,
            errors=self._errors,
            error_count=self._error_count,
        )


def main(generate: Callable[[Job], Coroutine[Any, Any, Seen]]) -> None:
    """The whole of a generator process: job in, load, result out."""
    raise_file_limit()
    job = read_job()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        write_seen(runner.run(generate(job)))
