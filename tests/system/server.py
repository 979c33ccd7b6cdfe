"""``roundhouse serve`` and ``gateway`` as processes on free ports, as the system tests use them."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import httpx

START_S = 60.0
STOP_S = 30.0
REQUEST_S = 60.0


class Server:
    """A running server. ``rest`` is its base URL, ``grpc`` its address, ``client`` talks to it."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self.process = process
        self.rest = ready["rest"]
        self.grpc = ready["grpc"]
        self.model = ready["model"]
        self.client = httpx.Client(base_url=self.rest, timeout=REQUEST_S)

    def worker_pid(self) -> int:
        """The process id of its only worker."""
        (pid,) = children(self.process.pid)
        return pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process that was started, not to its workers."""
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Waits for its end; returns the exit status."""
        return self.process.wait(STOP_S)


def children(pid: int) -> list[int]:
    """Process ids of the children."""
    return [child for child, (parent, _) in processes().items() if parent == pid]


def alive(pid: int) -> bool:
    """Whether the process runs (one that has ended and waits to be collected does not)."""
    return processes().get(pid, (0, "Z"))[1] != "Z"


def processes() -> dict[int, tuple[int, str]]:
    """Every process: its parent and the letter of its state. Small images lack ``ps``."""
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-A", "-o", "pid=,ppid=,stat="]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows = (row.split() for row in shown.splitlines())
        return {int(pid): (int(parent), state[0]) for pid, parent, state in rows}
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            found[int(path.parent.name)] = (int(parent), state)
    return found


def eventually(condition: Callable[[], bool], within_s: float = STOP_S) -> None:
    """Waits for a condition of another process; fails when the time is over."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def start(
    arguments: tuple[str, ...], errors: IO[str], python: str = sys.executable, **env: str
) -> subprocess.Popen[str]:
    """Starts ``roundhouse serve`` with these arguments and variables, by an interpreter."""
    command = ("serve", "--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0", *arguments)
    return _start(command, errors, python, env)


def start_gateway(
    arguments: tuple[str, ...], errors: IO[str], python: str = sys.executable
) -> subprocess.Popen[str]:
    """Starts ``roundhouse gateway`` with these arguments, by an interpreter."""
    command = ("gateway", "--json-output", "--hostname", "127.0.0.1", "--port", "0", *arguments)
    return _start(command, errors, python, {})


def start_router(arguments: tuple[str, ...], errors: IO[str]) -> subprocess.Popen[str]:
    """Starts ``roundhouse router`` with these arguments."""
    ports = ("--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0")
    return _start(("router", "--json-output", *ports, *arguments), errors, sys.executable, {})


def _start(
    command: tuple[str, ...], errors: IO[str], python: str, env: Mapping[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", "deploy.cli", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | env,
    )


def read_lines(process: subprocess.Popen[str], until: Callable[[str], bool]) -> list[str]:
    """Reads standard output up to the line that is waited for, at most ``START_S``."""
    stream, lines, found = process.stdout, queue.Queue[str | None](maxsize=1000), list[str]()
    assert stream is not None

    def read() -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_S
    while True:
        line = lines.get(timeout=max(0.01, deadline - time.monotonic()))
        assert line is not None, f"it ended before it was ready, after saying {found}"
        found.append(line)
        if until(line):
            return found


@contextmanager
def serving(folder: Path, *arguments: str, python: str = sys.executable) -> Iterator[Server]:
    """A server that is ready; ended, however the test went, with all it started."""
    with (folder / "stderr").open("w") as errors:
        process = start(("--json-output", *arguments), errors, python, TMPDIR=str(folder))
        workers: list[int] = []
        try:
            server = Server(process, ready(process, folder / "stderr"))
            workers = children(process.pid)
            with server.client:
                yield server
        finally:
            end(process)
            for pid in workers:
                eventually(lambda pid=pid: not alive(pid))  # type: ignore[misc]


@contextmanager
def gateway(
    folder: Path, router: str, *arguments: str, python: str = sys.executable
) -> Iterator[Server]:
    """A gateway before a router, by its gRPC address; ended, however the test went."""
    with (folder / "gateway").open("a") as errors:
        process = start_gateway(("--router", router, *arguments), errors, python)
        try:
            server = Server(process, ready(process, folder / "gateway"))
            with server.client:
                yield server
        finally:
            end(process)


def ready(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    """What a process says when it is ready; fails with its log if it never is."""
    try:
        (*_, line) = read_lines(process, lambda line: line.startswith("{"))
    except (AssertionError, queue.Empty) as error:
        raise AssertionError(log.read_text()) from error
    said: dict[str, str] = json.loads(line)
    return said


def end(process: subprocess.Popen[str]) -> None:
    """Asks the process to end, then makes it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
