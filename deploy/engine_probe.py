"""What is true of each engine on this machine: installed, working, on which devices; or why not.

Each engine that is installed is asked in its own interpreter, all at once, under a deadline.
Nothing of an engine is imported here.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.declared import declared
from deploy.engines import ENGINES, Facts, device_name, importable, python_range
from deploy.environment import last_line
from deploy.hardware import Hardware
from deploy.interpreters import environment_of, installed_apart, interpreter_of

SCRIPT = Path(__file__).with_name("probe_script.py")
DEADLINE_S = 30.0
READY, MISSING, BROKEN = "ready", "missing", "broken"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an interpreter said of an engine. ``error`` is one line; empty if all is well."""

    version: str = ""
    devices: tuple[str, ...] = ()
    python: str = ""
    roundhouse: str = ""
    worker: bool = True
    error: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """One engine here. ``why`` says why it cannot run, ``mend`` is the command that helps.

    ``where`` is the folder of its own environment, or the interpreter that it shares. ``note`` is
    what an operator should know of an engine that does run.
    """

    facts: Facts
    state: str
    where: str = ""
    version: str = ""
    devices: tuple[str, ...] = ()
    why: str = ""
    mend: str = ""
    note: str = ""


def ask(
    interpreter: str, facts: Facts, *, devices: bool = True, deadline_s: float = DEADLINE_S
) -> Answer:
    """Runs the probe in an interpreter. Without ``devices`` no library is imported there."""
    library = facts.library if devices else ""
    command = [interpreter, "-P", str(SCRIPT), facts.module, library, *facts.distributions]
    try:
        said = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"its interpreter did not answer within {deadline_s:g} s")
    except OSError as error:
        return Answer(error=f"its interpreter {interpreter} cannot be run: {error.strerror}")
    try:
        found = json.loads(last_line(said.stdout))
        return Answer(
            version=found["version"],
            devices=tuple(found["devices"]),
            python=found["python"],
            roundhouse=found["roundhouse"],
            worker=found["worker"],
            error=found["error"],
        )
    except (ValueError, TypeError, KeyError):
        return Answer(error=f"its interpreter failed: {last_line(said.stderr)}")


def probe(facts: Facts, hardware: Hardware, deadline_s: float = DEADLINE_S) -> Report:
    """Finds out about one engine."""
    folder = environment_of(facts.name)
    apart = installed_apart(facts.name)
    if not apart and not importable(facts.name):
        return absent(facts, hardware, interrupted=folder.exists())
    answer = ask(interpreter_of(facts.name), facts, deadline_s=deadline_s)
    where = str(folder) if apart else sys.executable
    return judge(facts, hardware, answer, where=where, apart=apart)


def absent(facts: Facts, hardware: Hardware, *, interrupted: bool) -> Report:
    """An engine whose package is not there; what hinders it most comes first."""
    install = f"roundhouse engines install {facts.name}"
    installable = facts.extra in declared().extras if facts.extra else False
    mend = install if installable else f"see {facts.page}"
    this = sys.version_info[:2]
    low, high = facts.python
    if why := lacking(facts, hardware):
        return Report(facts, MISSING, why=why, mend="use a machine that has one")
    if interrupted:
        return Report(facts, MISSING, why="its installation was interrupted", mend=install)
    if not low <= this < high:
        why = f"needs Python {python_range(facts)}, and this is {this[0]}.{this[1]}"
        mend = f"{install} --python python{low[0]}.{low[1]}" if installable else mend
        return Report(facts, MISSING, why=why, mend=mend)
    return Report(facts, MISSING, why=f"package {facts.distributions[0]} is missing", mend=mend)


def judge(facts: Facts, hardware: Hardware, answer: Answer, *, where: str, apart: bool) -> Report:
    """An engine whose package is there, by what its interpreter said."""
    devices = answer.devices or tuple(hardware.named(facts.devices))
    report = Report(facts, READY, where, answer.version, devices)
    again = f"roundhouse engines install {facts.name} --again"
    mend = again if apart else f"roundhouse engines install {facts.name}"
    if answer.error:
        return replace(report, state=BROKEN, devices=(), why=answer.error, mend=mend)
    if not answer.worker:
        why = "its environment lacks Roundhouse's worker"
        return replace(report, state=BROKEN, why=why, mend=mend)
    if why := lacking(facts, hardware):
        return replace(report, state=BROKEN, why=why, mend="use a machine that has one")
    return replace(report, note=unseen(facts, hardware, answer) or outdated(answer, mend))


def lacking(facts: Facts, hardware: Hardware) -> str:
    """Which device is missing, if the engine can use none of those that are here."""
    if any(kind in hardware.kinds for kind in facts.devices):
        return ""
    wanted = " or ".join(map(device_name, facts.devices))
    return f"runs on {wanted}, and there is none here"


def unseen(facts: Facts, hardware: Hardware, answer: Answer) -> str:
    """The accelerator that is here and that the installed build cannot use."""
    here = [kind for kind in hardware.kinds if kind in facts.devices and kind != "cpu"]
    if not here or not all(one.startswith("cpu") for one in answer.devices or ("unknown",)):
        return ""
    return f"this build computes on the CPU alone and leaves {device_name(here[0])} idle"


def outdated(answer: Answer, mend: str) -> str:
    """That the environment has another version of Roundhouse than this one."""
    ours = declared().version
    if answer.roundhouse in ("", ours):
        return ""
    return f"its environment has Roundhouse {answer.roundhouse}, this is {ours}: {mend}"


def probe_all(
    hardware: Hardware, names: Sequence[str] = tuple(ENGINES), deadline_s: float = DEADLINE_S
) -> list[Report]:
    """All engines, asked at the same time; in the order of ``names``."""
    with ThreadPoolExecutor(max_workers=len(names)) as threads:
        asked = [threads.submit(probe, ENGINES[name], hardware, deadline_s) for name in names]
        return [one.result() for one in asked]
