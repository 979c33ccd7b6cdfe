"""Ports that somebody else takes while a model is loaded."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.server import STOP_S, end, eventually

SLOW = """#!/bin/sh
echo > "{folder}/loading"
until [ -e "{folder}/go" ]; do sleep 0.05; done
exec {python} "$@"
"""
"""A Python in which a worker begins when it is told to."""


@pytest.mark.parametrize("taken", ["port", "grpc-port"])
def test_a_port_that_is_taken_meanwhile_is_told_with_its_option(tmp_path: Path, taken: str) -> None:
    python = tmp_path / "python"
    python.write_text(SLOW.format(folder=tmp_path, python=sys.executable))
    python.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    ports = {"port": "0", "grpc-port": "0"} | {taken: port}
    words = [word for name, value in ports.items() for word in (f"--{name}", value)]
    words += ["--hostname", "127.0.0.1", "--engine", "scripted", "--worker-python", str(python)]
    command = [sys.executable, "-m", "deploy.cli", "serve", *words]
    env = os.environ | {"ROUNDHOUSE_CONTROL": str(tmp_path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        eventually((tmp_path / "loading").exists)
        with socket.create_server(("127.0.0.1", int(port))):
            (tmp_path / "go").touch()
            _, said = process.communicate(timeout=STOP_S)
    finally:
        end(process)
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith(f"roundhouse: error: cannot listen on 127.0.0.1:{port}: ")
    assert f"choose another port with --{taken}, or another address with --hostname" in last
