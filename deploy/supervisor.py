"""Keeps worker processes alive on this machine: start, relay progress, restart, end.

One ``Supervisor`` owns one process per rank. Each process listens on a unix socket in a private
folder, runs in a session of its own (so that Ctrl-C reaches the router first, which drains), and
ends by itself when its standard input closes, however its parent died.
"""

import asyncio
import contextlib
import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

# Pauses before a dead worker is started again. A worker that lived this long starts from the first.
RESTART_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
HEALTHY_S = 30.0
# Deaths in a row from which on the report says that it is a loop.
LOOP_DEATHS = 4
# How long a worker may take to leave when asked to, before it is killed.
LEAVE_S = 5.0
# Longest line that is read from a worker at once, in bytes.
LINE_MAX = 1 << 16


class StartError(Exception):
    """A worker ended before it was ever ready. The text is its own one line."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """How to start one worker: its name in reports, its command, its socket."""

    name: str
    command: tuple[str, ...]
    socket: Path
    env: Mapping[str, str] | None = None


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
    """A worker has ended and is started again after ``pause_s`` seconds."""

    worker: str
    reason: str
    deaths: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """A warning of a worker, or a line of its standard error that is no report."""

    worker: str
    line: str


News = Loading | Ready | Died | Said


@dataclass(slots=True)
class _Life:
    """One process of a worker, from start to end."""

    process: asyncio.subprocess.Process
    began: float
    ready: bool = False
    error: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    def reason(self, code: int) -> str:
        """Why it ended, in one line: its own words if it had any."""
        if self.error:
            return self.error
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said = f": {self.tail[-1]}" if self.tail else ""
        return f"ended with status {code}{said}"


class Supervisor:
    """Owner of the worker processes. ``news`` is called with all that a person may want to know."""

    def __init__(
        self,
        workers: Sequence[WorkerSpec],
        news: Callable[[News], None],
        pauses_s: Sequence[float] = RESTART_PAUSES_S,
        leave_s: float = LEAVE_S,
    ) -> None:
        self._workers = tuple(workers)
        self._news = news
        self._pauses_s = pauses_s
        self._leave_s = leave_s
        self._unready = {worker.name for worker in workers}
        self._all_ready = asyncio.Event()

    async def all_ready(self) -> None:
        """Waits until every worker has been ready once. ``run`` raises if one cannot be."""
        await self._all_ready.wait()

    async def run(self) -> None:
        """Keeps all workers alive until cancelled; ends them on the way out.

        Raises ``StartError`` when a worker ends before it was ever ready.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(self._keep(worker))
        except ExceptionGroup as group_error:
            failed, others = group_error.split(StartError)
            if failed is None or others is not None:
                raise
            raise failed.exceptions[0] from None

    async def _keep(self, worker: WorkerSpec) -> None:
        """Lives of one worker, one after the other."""
        deaths = 0
        while True:
            life = await self._start(worker)
            try:
                code = await self._live(worker, life)
            finally:
                await _end(life.process, self._leave_s)
            lasted = monotonic() - life.began
            if worker.name in self._unready:
                raise StartError(f"{worker.name}: {life.reason(code)}")
            deaths = 1 if life.ready and lasted >= HEALTHY_S else deaths + 1
            pause = self._pauses_s[min(deaths, len(self._pauses_s)) - 1]
            self._news(Died(worker.name, life.reason(code), deaths, pause))
            await asyncio.sleep(pause)

    async def _start(self, worker: WorkerSpec) -> _Life:
        """Starts a process on a socket path that nobody holds."""
        worker.socket.unlink(missing_ok=True)
        try:
            process = await asyncio.create_subprocess_exec(
                *worker.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=LINE_MAX,
                env=worker.env,
            )
        except OSError as error:
            raise StartError(f"{worker.name}: cannot run {worker.command[0]}: {error}") from error
        return _Life(process, monotonic())

    async def _live(self, worker: WorkerSpec, life: _Life) -> int:
        """Reads what the process says until it ends; returns its exit status."""
        stream = life.process.stderr
        assert stream is not None, "the process was started with a pipe for its standard error"
        while line := await _line(stream):
            self._hear(worker, life, line.decode(errors="replace").rstrip())
        return await life.process.wait()

    def _hear(self, worker: WorkerSpec, life: _Life, line: str) -> None:
        """Acts on one line of a worker: a report as a JSON object, or anything else."""
        report = _report(line)
        match report.get("event"):
            case "loading":
                self._news(Loading(worker.name, float(str(report.get("fraction", 0)))))
            case "ready":
                again = worker.name not in self._unready
                life.ready = True
                self._news(Ready(worker.name, monotonic() - life.began, again))
                self._unready.discard(worker.name)
                if not self._unready:
                    self._all_ready.set()
            case "warning":
                self._news(Said(worker.name, str(report.get("message", line))))
            case "listening":
                pass  # the router dials until it answers
            case "error":
                life.error = str(report.get("message", line))
            case _ if line:
                life.tail.append(line)
                self._news(Said(worker.name, line))


def _report(line: str) -> dict[str, object]:
    """The JSON object on a line, or an empty one."""
    if not line.startswith("{"):
        return {}
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


async def _line(stream: asyncio.StreamReader) -> bytes:
    """The next line; the pieces of one that is too long, one after the other."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError as long:
        return await stream.readexactly(long.consumed)


async def _end(process: asyncio.subprocess.Process, leave_s: float) -> None:
    """Makes a process leave: closes its input, asks, then kills."""
    if process.returncode is not None:
        return
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(leave_s):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()
