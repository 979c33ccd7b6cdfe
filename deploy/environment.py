"""A virtual environment that is being filled, step by step. Standard library only.

Shared by the project's own set-up (``setup_env``) and the environments of engines
(``engine_env``). A stamp in the environment, written last, says what has been installed; whatever
has no stamp is not used.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAMP = "roundhouse-setup.json"
# How long an interpreter may take to say that it has pip.
PIP_CHECK_S = 60
# Time that a step has to leave when it is told to, before it is killed.
LEAVE_S = 10
# With less room than this left on a disk, that is why a step failed.
ROOM_MIN_BYTES = 64 << 20
REASON_MAX = 300
# What pip says before it tries an index again, and last of all if it never answered.
_UNREACHED = re.compile(r"after connection broken by '(.+)': ")
_NOTHING_FOUND = "(from versions: none)"


class SetupError(Exception):
    """Set-up cannot go on. The text says why and what to do."""


class StepFailed(SetupError):
    """A step ended with an error. The text has the end of its log."""

    def __init__(self, step: "Step") -> None:
        self.step = step
        self.lines = step.log.read_text(errors="replace").splitlines()
        tail = "\n".join(self.lines[-25:])
        super().__init__(f"{step.title} failed; the end of {step.log}:\n{tail}")

    def one_line(self) -> str:
        """The same in one line: pip's own reason, and where the log is."""
        reasons = [line for line in self.lines if line.lstrip().startswith("ERROR:")]
        reason = reasons[0].strip() if reasons else last_line("\n".join(self.lines))
        if _NOTHING_FOUND in reason and (why := _unreached(self.lines)):
            reason = f"the package index cannot be reached: {why}"
        room = lacking_room(self.step.log.parent)
        return f"{self.step.title} failed: {reason}{room}; the log is {self.step.log}"


@dataclass
class Step:
    """One command that runs in the background, with its output in a log file."""

    title: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def progress(self) -> str:
        """The last ``[done/all]`` that the build tool has printed, as a percentage."""
        found = re.findall(rb"\[(\d+)/(\d+)\] ", self.log.read_bytes())
        return f", {100 * int(found[-1][0]) // int(found[-1][1])} %" if found else ""


class Environment:
    """A virtual environment in ``folder``; ``root`` is where its commands run."""

    def __init__(self, folder: Path, root: Path, base_python: str = sys.executable) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.stamp = folder / STAMP
        self._root = root
        self._base_python = base_python

    def create(self) -> None:
        """Makes the environment, or completes one whose making was interrupted."""
        if self._has_pip():
            return
        say(f"creating a virtual environment in {self.folder}")
        new = not self.folder.exists()
        command = [self._base_python, "-m", "venv", str(self.folder)]
        try:
            made = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError as error:
            raise SetupError(f"cannot run {self._base_python}: {error.strerror}") from error
        if made.returncode:
            room = lacking_room(self.folder)
            if new:
                shutil.rmtree(self.folder, ignore_errors=True)
            said = made.stdout + made.stderr
            mend = "" if room else " (on Debian and Ubuntu: apt install python3-venv)"
            raise SetupError(
                f"{self._base_python} cannot make a virtual environment in {self.folder}{mend}:"
                f" {' '.join(said.split())}{room}"
            )

    def _has_pip(self) -> bool:
        """Whether the environment is there, its pip too, which is installed last."""
        command = [str(self.python), "-m", "pip", "--version"]
        try:
            said = subprocess.run(command, check=False, capture_output=True, timeout=PIP_CHECK_S)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return said.returncode == 0

    def pip(self, title: str, *arguments: str, env: Mapping[str, str] | None = None) -> Step:
        """Starts ``pip`` in the background."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        return self.start(title, command, env)

    def start(self, title: str, command: Sequence[str], env: Mapping[str, str] | None) -> Step:
        """Starts a command in the background, with variables on top of this process's."""
        log = self.folder / f"setup-{re.sub('[^a-z0-9]+', '-', title.lower())}.log"
        with _told(log), log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                # Compilers that pip has started do not end with it; so the whole group is told.
                start_new_session=True,
            )
        return Step(title, process, log, time.monotonic())

    def stamped(self) -> dict[str, Any]:
        """What the stamp says; empty if there is none, or none that can be read."""
        try:
            found = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def has(self, extras: Sequence[str], digest: str) -> bool:
        """Whether the stamp says that these extras are installed from what has this digest."""
        stamp = self.stamped()
        return stamp.get("digest") == digest and set(extras) <= set(stamp.get("extras", ()))

    def write_stamp(self, extras: Sequence[str], digest: str, **facts: object) -> None:
        """Says, last of all, what has been installed. The file is there whole or not at all."""
        partial = self.stamp.with_suffix(".new")
        with _told(partial):
            partial.write_text(json.dumps({"digest": digest, "extras": sorted(extras), **facts}))
            partial.replace(self.stamp)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses becomes a ``SetupError`` that names the file."""
    try:
        yield
    except OSError as error:
        raise SetupError(f"{error.filename or path}: {error.strerror}") from error


def lacking_room(folder: Path) -> str:
    """That the disk of a folder, which need not be there yet, is full; words to put behind others.

    Empty if it is not.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    left = shutil.disk_usage(there).free
    return f"; the disk of {there} has {left >> 20} MiB left" if left < ROOM_MIN_BYTES else ""


def _unreached(lines: Sequence[str]) -> str:
    """Why pip could not reach an index, as it said last; empty if it could."""
    found = [match[1] for match in map(_UNREACHED.search, lines) if match]
    return re.sub("<[^>]*>: ", "", found[-1])[:REASON_MAX] if found else ""


def say(text: str) -> None:
    """Prints one line at once."""
    print(f"setup: {text}", flush=True)


def last_line(text: str) -> str:
    """The last line that is not empty: where Python and compilers put the reason."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def wait(steps: Sequence[Step]) -> None:
    """Waits for all steps, shows that they are alive, and raises ``StepFailed`` if one fails.

    A terminal gets one line that counts up; a log file gets a line every 20 seconds.
    """
    tty = sys.stdout.isatty()
    pause, shown = (1.0 if tty else 20.0), time.monotonic()
    running = list(steps)
    while running:
        for step in [step for step in running if step.process.poll() is not None]:
            running.remove(step)
            finish(step, tty)
        time.sleep(0.1)
        if running and time.monotonic() - shown >= pause:
            shown = time.monotonic()
            parts = (f"{step.title} ({elapsed(step)}{step.progress()})" for step in running)
            print(f"setup:   ... {', '.join(parts)}", end="\033[K\r" if tty else "\n", flush=True)


def elapsed(step: Step) -> str:
    """Minutes and seconds since the step began."""
    minutes, seconds = divmod(int(time.monotonic() - step.began), 60)
    return f"{minutes}:{seconds:02}"


def finish(step: Step, tty: bool) -> None:
    """Reports the end of a step; raises ``StepFailed`` if it failed."""
    if tty:
        print(end="\033[K")
    if step.process.returncode != 0:
        raise StepFailed(step)
    say(f"{step.title}: done in {elapsed(step)}")


def stop(steps: Sequence[Step]) -> None:
    """Ends what still runs, and all that it has started: a failure leaves nothing behind."""
    for step in steps:
        if step.process.poll() is None:
            _signal(step, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.process.wait(LEAVE_S)
            _signal(step, signal.SIGKILL)
            step.process.wait()


def _signal(step: Step, number: signal.Signals) -> None:
    """Sends a signal to a step's process and its children, as far as there are any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(step.process.pid, number)


def run(steps: Sequence[Step]) -> None:
    """Waits for the steps; on any failure or interrupt, SIGTERM too, ends those that still run."""
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        wait(steps)
    finally:
        stop(steps)
        signal.signal(signal.SIGTERM, before)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def status_of(work: Callable[[], None]) -> int:
    """Does the work of a program that sets up, and returns its exit status; a failure is a line."""
    try:
        work()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next call goes on", file=sys.stderr)
        return 130
    return 0
