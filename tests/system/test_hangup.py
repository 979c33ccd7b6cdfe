"""A terminal that closes: what runs on it lets its answers end, and leaves nothing behind."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.system.server import Server, alive, children, end, eventually, read_lines

SCRIPTED = ("--engine", "scripted", "--engine-option", "step_ms=5")
ASKED = {"inputs": "Count", "parameters": {"max_new_tokens": 100}}
# A session's leader gets the terminal that it opens first.
SHELL = 'exec "$@" <"$TERMINAL" 2>"$TERMINAL"'


@contextmanager
def on_terminal(folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process on a terminal of its own, and the other end of that, which the test closes."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERMINAL": os.ttyname(theirs), "TMPDIR": str(folder)}
    words = (sys.executable, "-m", "deploy.cli", *command)
    process = subprocess.Popen(
        ["/bin/sh", "-c", SHELL, "sh", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        yield process, ours
    finally:
        end(process)
        os.close(theirs)


def data(line: str) -> Any:
    return json.loads(line.removeprefix("data:"))


def test_a_closed_terminal_lets_a_running_answer_end(tmp_path: Path) -> None:
    ports = ("--hostname", "127.0.0.1", "--port", "0", "--grpc-port", "0")
    command = ("serve", "--json-output", *ports, *SCRIPTED)
    with on_terminal(tmp_path, *command) as (process, terminal):
        told = read_lines(process, lambda line: "rest" in line)[-1]
        server = Server(process, json.loads(told))
        (worker,) = children(process.pid)
        with server.client, server.client.stream("POST", "/generate_stream", json=ASKED) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.close(terminal)
            last = data(list(lines)[-1])
        assert last["generated_text"]
        assert server.wait() == 0
        eventually(lambda: not alive(worker))
    assert not list(tmp_path.glob("roundhouse-*"))
