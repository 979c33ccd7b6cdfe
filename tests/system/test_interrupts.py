"""Ctrl-C at any moment of a command's beginning: one clean exit, and no traceback."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.system.server import STOP_S, end

ROUNDHOUSE, LAUNCHER = "deploy.cli", "deploy.tgi_launcher"
SERVE = ("serve", "--engine", "scripted", "--port", "0", "--grpc-port", "0")
NOWHERE = "127.0.0.1:9"
# A command, and the modules behind whose import it is interrupted: none is the last that it needs.
MOMENTS = (
    (ROUNDHOUSE, SERVE, ("click", "deploy.options", "deploy.groups", "grpc", "fastapi")),
    (ROUNDHOUSE, ("router", "--worker", NOWHERE), ("click", "grpc", "fastapi")),
    (ROUNDHOUSE, ("gateway", "--router", NOWHERE), ("click", "grpc", "fastapi")),
    (ROUNDHOUSE, ("worker", "--engine", "scripted", "--listen", NOWHERE), ("asyncio", "grpc")),
    (ROUNDHOUSE, ("groups", "--port", "9"), ("click", "grpc")),
    (ROUNDHOUSE, ("tune",), ("click", "deploy.engines")),
    (LAUNCHER, ("--port", "0"), ("click", "deploy.tgi_flags", "grpc", "fastapi")),
)


@pytest.mark.parametrize(
    ("program", "arguments", "behind"),
    [(program, arguments, one) for program, arguments, many in MOMENTS for one in many],
)
def test_ctrl_c_while_it_imports_ends_it_quietly(
    program: str, arguments: tuple[str, ...], behind: str
) -> None:
    """Python says what it has imported, also when the worker has taken the command's place."""
    process = subprocess.Popen(
        [sys.executable, "-m", program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "ENGINE": "scripted"},
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        assert any(re.fullmatch(rf"import time:.*\| +{re.escape(behind)}\n", one) for one in lines)
        process.send_signal(signal.SIGINT)
        said = [line for line in lines if not line.startswith("import time:")]
        assert process.wait(STOP_S) == 130
    finally:
        end(process)
        process.stderr.close()
    assert [line for line in said if not line.startswith("serving ")] == []


IGNORING = """
import os, signal
from shards.interrupts import end_quietly, interrupt, quietly
end_quietly()
os.kill(os.getpid(), signal.SIGINT)
with quietly():
    os.kill(os.getpid(), signal.SIGINT)
interrupt()
os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_that_is_to_be_ignored_is() -> None:
    """As in the background of a shell without job control."""
    shell = ["/bin/sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", IGNORING]
    assert subprocess.run(shell, check=False, timeout=60).returncode == 0
