"""Processes under measurement: started on free ports, ended by pid, their CPU time read."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LEAVE_S = 10.0
POLL_S = 0.05
LOG_TAIL = 3000


class StartError(Exception):
    """A system did not come up. The text has the end of what it printed."""


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


class Child:
    """A started process, leader of its own process group, and what it printed."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None, log: IO[bytes]
    ) -> None:
        self._log = log
        self.command = command
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def printed(self) -> str:
        """All that it has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool], deadline_s: float) -> None:
        """Polls ``ready``. Raises ``StartError`` when the process ends or the deadline passes."""
        until = time.monotonic() + deadline_s
        while not ready():
            code = self.process.poll()
            if code is not None or time.monotonic() > until:
                state = "not ready in time" if code is None else f"ended with status {code}"
                raise StartError(f"{' '.join(self.command)}: {state}\n{self.printed()[-LOG_TAIL:]}")
            time.sleep(POLL_S)

    def end(self) -> None:
        """Asks the process to leave, then kills its group."""
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVE_S)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[Child]:
    """A process for the length of a block."""
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".log") as log:
        child = Child(command, env, log)
        try:
            yield child
        finally:
            child.end()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads, in seconds; 10 ms steps."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def busy_cores(seconds: float) -> float:
    """How many cores were busy, on average, over the next so many seconds."""

    def busy_s() -> float:
        with Path("/proc/stat").open() as file:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(
                int, file.readline().split()[1:9]
            )
        return (user + nice + system + irq + softirq + steal) / TICKS_PER_S

    before, began = busy_s(), time.monotonic()
    time.sleep(seconds)
    return (busy_s() - before) / (time.monotonic() - began)


def wait_calm(cores: float, deadline_s: float) -> float:
    """Waits until fewer cores are busy, or the deadline; returns how many are."""
    until = time.monotonic() + deadline_s
    while True:
        busy = busy_cores(1.0)
        if busy < cores or time.monotonic() > until:
            return busy


def children(pid: int) -> list[int]:
    """Direct and indirect children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def command_line(pid: int) -> str:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
