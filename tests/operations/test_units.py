"""The units for systemd: what they start is what the command line takes."""

import re
import shlex
import signal
from pathlib import Path

import pytest

from shards.config import GRACEFUL_TERMINATION_TIMEOUT_S
from tests.operations.commands import read, unknown
from tests.operations.test_monitoring import FOLDER

UNITS = FOLDER / "systemd"
NAMES = ("roundhouse.service", "roundhouse-router.service", "roundhouse-worker@.service")
ALL = (*NAMES, "roundhouse-gateway@.service")
INSTANCE = "50061"
# What is read by others than options: Python, the hub's library, and our own folders.
OTHERS = ("HOME", "HF_HOME", "ROUNDHOUSE_HOME", "ROUNDHOUSE_CONTROL")
# Longest end of a server beyond the time that it gives to answers: what is written out, workers.
CLOSING_S = 20


def settings(name: str) -> dict[str, list[str]]:
    """The unit of an instance: each key with all that is said of it."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().replace("%i", INSTANCE).splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def command(name: str) -> list[str]:
    """What the unit starts, behind the program's name."""
    (line,) = settings(name)["ExecStart"]
    program, *arguments = shlex.split(line)
    assert program == "/opt/roundhouse/bin/roundhouse"
    return arguments


def variables(name: str) -> dict[str, str]:
    """What the unit itself sets."""
    lines = settings(name).get("Environment", [])
    pairs = (pair.split("=", 1) for line in lines for pair in shlex.split(line))
    return dict(pairs)  # type: ignore[arg-type]


def example(path: Path) -> dict[str, str]:
    """An environment file, with what is only suggested in it, too."""
    lines = re.findall(r"^#?([A-Z_]+)=(.*)$", path.read_text(), flags=re.MULTILINE)
    return {key: value.strip('"') for key, value in lines}


def examples(name: str) -> dict[str, str]:
    """What the environment files that come with a unit say, as far as there are any."""
    found: dict[str, str] = {}
    for line in settings(name)["EnvironmentFile"]:
        assert line.startswith("-/etc/roundhouse/")  # it may be missing
        if (path := UNITS / Path(line).name).exists():
            found |= example(path)
    assert found
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_unit_starts_what_the_command_line_takes(name: str) -> None:
    given = variables(name) | examples(name)
    arguments = command(name)
    assert not unknown(given, arguments[0], OTHERS)
    given.pop("ROUNDHOUSE_CONFIG", None)  # a file that is not here
    assert read(arguments, given)


def test_what_an_instance_is_called_is_its_port() -> None:
    worker = read(command("roundhouse-worker@.service"), variables("roundhouse-worker@.service"))
    assert worker["listen"] == f"127.0.0.1:{INSTANCE}"
    own = examples("roundhouse-gateway@.service")
    assert read(command("roundhouse-gateway@.service"), own)["own_port"] == int(INSTANCE)
    workers = read(command("roundhouse-router.service"), examples("roundhouse-router.service"))
    assert workers["workers"] == (worker["listen"],)


@pytest.mark.parametrize("name", ALL)
def test_a_unit_waits_for_what_a_server_may_take(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["TimeoutStartSec"] == ["infinity"]  # a model is loaded
    assert float(unit["TimeoutStopSec"][0]) >= GRACEFUL_TERMINATION_TIMEOUT_S + CLOSING_S
    assert unit["RestartPreventExitStatus"] == ["2"]  # nobody but a person can mend the options


def test_a_server_that_is_stopped_while_it_loads_has_not_failed() -> None:
    """It ends with this status then, which ``test_a_signal_while_loading`` shows."""
    stopped = settings("roundhouse.service").get("SuccessExitStatus", [])
    assert stopped == [str(128 + signal.SIGTERM)]


@pytest.mark.parametrize("name", ["roundhouse.service", "roundhouse-worker@.service"])
def test_units_with_workers_leave_their_devices_and_their_code_alone(name: str) -> None:
    unit = settings(name)
    assert unit["KillMode"] == ["mixed"]  # workers are told by their router, engines by workers
    # The first three close devices of accelerators, the last what engines compile as they run.
    for key in ("PrivateDevices", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"):
        assert key not in unit


def test_units_that_share_a_folder_or_a_port_have_one_user() -> None:
    assert {tuple(settings(name)["User"]) for name in ALL} == {("roundhouse",)}
    folders = [settings(name).get("RuntimeDirectory") for name in ALL]
    assert len({*map(str, folders)}) == len(ALL)  # a unit's is removed with it
