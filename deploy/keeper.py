"""One group of worker processes on this machine, kept alive: start, relay progress, restart, end.

The unit of life is the group, because its ranks wait for each other in every step: when one ends,
the others are ended too, and all start anew at another rendezvous. Each process listens on a unix
socket in a private folder, runs in a session of its own (so that Ctrl-C reaches the router first,
which drains), and ends by itself when its standard input closes, however its parent died.
"""

import asyncio
import json
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from deploy.processes import WorkerProcess

# A life that lasted so long was a healthy one; deaths in a row are counted from there.
HEALTHY_S = 30.0
# Deaths in a row from which on the report says that it is a loop.
LOOP_DEATHS = 4
# How long the other ranks of one that has ended may take to leave, before they are killed: they may
# be stuck in an exchange with it.
ORPHAN_RANK_S = 1.0
# How often a group that was never ready is started because its rendezvous had been taken.
STARTS_MAX = 3
ADDRESS_TAKEN = re.compile(r"(?i)address already in use|EADDRINUSE")


class StartError(Exception):
    """A worker ended before its group was ever ready. The text is its own one line."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start one worker: its name in reports, its command, its socket.

    ``env`` holds variables on top of this process's own. ``doubt`` is what to say of a program that
    ends without one word that a worker would say.
    """

    name: str
    command: tuple[str, ...]
    socket: Path
    env: Mapping[str, str] | None = None
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """A worker has loaded this fraction, 0 to 1, of its model."""

    worker: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker listens, ``seconds`` after its start; ``again`` if not for the first time."""

    worker: str
    seconds: float
    again: bool


@dataclass(frozen=True, slots=True)
class Died:
    """A worker has ended; its group, of ``ranks``, is started again after ``pause_s`` seconds."""

    worker: str
    reason: str
    deaths: int
    pause_s: float
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Said:
    """A warning of a worker, or that it leaves, or a line of its standard error: no report."""

    worker: str
    line: str


News = Loading | Ready | Died | Said


@dataclass(slots=True)
class _Rank:
    """One process of a group's life, and what it has said."""

    worker: WorkerSpec
    ready: bool = False
    reported: bool = False
    error: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    def reason(self, code: int, *, was_ready: bool) -> str:
        """Why it ended, in one line: its own words if it had any."""
        if self.error:
            return self.error
        if code < 0:
            return f"killed by {_signal_name(-code)}{'' if was_ready else _advice(-code)}"
        said = f": {self.tail[-1]}" if self.tail else ""
        doubt = f"; {self.worker.doubt}" if self.worker.doubt and not self.reported else ""
        return f"ended with status {code}{said}{doubt}"


@dataclass(frozen=True, slots=True)
class _End:
    """How a life of a group came to its end: whose end it was, and why.

    ``proven`` says that all ranks had been ready for long enough to be called healthy.
    """

    worker: str
    reason: str
    proven: bool = False
    address_taken: bool = False


class Keeper:
    """The lives of one group, one after the other. ``ready`` is called when all ranks are.

    ``news`` is called with all that a person may want to know.
    """

    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        news: Callable[[News], None],
        ready: Callable[[], None],
        pauses_s: Sequence[float],
        leave_s: float,
    ) -> None:
        self._workers = tuple(workers)
        self._news = news
        self._ready = ready
        self._pauses_s = pauses_s
        self._leave_s = leave_s
        self._ranks: list[_Rank] = []
        self._processes: list[WorkerProcess] = []
        self._ending = False
        self.was_ready = False

    def replace(self, reason: str) -> None:
        """Kills the present life, if all of it is ready; another then begins."""
        if self._processes and all(rank.ready for rank in self._ranks):
            for rank, process in zip(self._ranks, self._processes, strict=True):
                rank.error = reason
                process.kill()

    async def keep(self) -> None:
        """Lives again and again until cancelled; then no process is left, and no socket.

        Raises ``StartError`` if it cannot start.
        """
        try:
            await self._keep()
        finally:
            for worker in self._workers:
                worker.socket.unlink(missing_ok=True)

    async def _keep(self) -> None:
        deaths = 0
        while True:
            end = await self._live()
            deaths = 1 if end.proven else deaths + 1
            if not self.was_ready and not (end.address_taken and deaths < STARTS_MAX):
                raise StartError(f"{end.worker}: {end.reason}")
            pause = self._pauses_s[min(deaths, len(self._pauses_s)) - 1]
            self._news(Died(end.worker, end.reason, deaths, pause, len(self._workers)))
            await asyncio.sleep(pause)

    async def _live(self) -> _End:
        """One life: starts all ranks, waits until one ends, and ends the others."""
        ranks = self._ranks = [_Rank(worker) for worker in self._workers]
        processes: list[WorkerProcess] = []
        self._processes = processes
        self._ending, began, grace_s = False, monotonic(), self._leave_s
        try:
            rendezvous = ("--rendezvous", free_address()) if len(ranks) > 1 else ()
            for rank in ranks:  # each is kept as soon as it is there, so that it is ended
                process = await self._start(rank, rendezvous, ranks, began)
                processes.append(process)
            place, code = await _first_end(processes)
            grace_s = min(ORPHAN_RANK_S, grace_s)
        except OSError as error:
            worker = ranks[len(processes)].worker
            return _End(worker.name, f"cannot run {worker.command[0]}: {error}")
        finally:
            self._ending = True
            await to_the_end(asyncio.gather(*(process.end(grace_s) for process in processes)))
        lasted = monotonic() - began
        return _End(
            ranks[place].worker.name,
            ranks[place].reason(code, was_ready=self.was_ready),
            proven=all(rank.ready for rank in ranks) and lasted >= HEALTHY_S,
            address_taken=bool(rendezvous) and any(map(_found_address_taken, ranks)),
        )

    async def _start(
        self, rank: _Rank, rendezvous: Sequence[str], ranks: Sequence[_Rank], began: float
    ) -> WorkerProcess:
        """Starts a process on a socket path that nobody holds. Raises ``OSError``."""
        worker = rank.worker
        worker.socket.unlink(missing_ok=True)
        env = None if worker.env is None else os.environ | dict(worker.env)

        def hear(line: str) -> None:
            self._hear(rank, line, ranks, began)

        return await WorkerProcess.start((*worker.command, *rendezvous), env, hear)

    def _hear(self, rank: _Rank, line: str, ranks: Sequence[_Rank], began: float) -> None:
        """Acts on one line of a worker: a report as a JSON object, or anything else."""
        name, report = rank.worker.name, _report(line)
        rank.reported |= "event" in report
        match report.get("event"):
            case "loading":
                self._news(Loading(name, _fraction(report.get("fraction"))))
            case "ready":
                rank.ready = True
                self._news(Ready(name, monotonic() - began, self.was_ready))
                if all(one.ready for one in ranks):
                    self.was_ready = True
                    self._ready()
            case "leaving" if self._ending:
                pass  # it was asked here, and what it says is for those who did not
            case "warning" | "leaving":
                self._news(Said(name, str(report.get("message", line))))
            case "listening":
                pass  # the router dials until it answers
            case "error":
                rank.error = str(report.get("message", line))
            case _ if line:
                rank.tail.append(line)
                self._news(Said(name, line))


def free_address() -> str:
    """HOST:PORT on this machine where nobody listens.

    Another program may take the port before rank 0 listens there, as with every port that is chosen
    for somebody else. The group then ends and is started again, with another one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def to_the_end(work: Awaitable[object]) -> None:
    """Waits for work that ends soon, also if this task is cancelled meanwhile; then raises that.

    A group that is being ended is cancelled again when all are: nothing must be left for that.
    """
    done, cancelled = asyncio.ensure_future(work), False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            cancelled = True
    done.result()
    if cancelled:
        raise asyncio.CancelledError


async def _first_end(processes: Sequence[WorkerProcess]) -> tuple[int, int]:
    """Waits for the first process to end; returns its place and its exit status."""
    waits = [asyncio.create_task(process.ended()) for process in processes]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        place = next(place for place, wait in enumerate(waits) if wait.done())
        return place, waits[place].result()
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _signal_name(number: int) -> str:
    """A signal as people call it; most of the real-time ones have no name."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _advice(number: int) -> str:
    """What else is to be said of a worker that was killed before its group was ever ready."""
    if number != signal.SIGKILL:
        return ""
    what = "a smaller model, or fewer --kv-tokens, takes less"
    return f"; if nobody did that, the system ran out of memory: {what}"


def _found_address_taken(rank: _Rank) -> bool:
    return any(ADDRESS_TAKEN.search(line) for line in (rank.error, *rank.tail))


def _fraction(value: object) -> float:
    """A fraction as a worker reports it; 0 for anything else."""
    return float(value) if isinstance(value, int | float) else 0.0


def _report(line: str) -> dict[str, object]:
    """The JSON object on a line, or an empty one."""
    if not line.startswith("{"):
        return {}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
