"""The image: what it is made of is there, and its commands are what they were meant for.

Nothing is built here: what is said in the Dockerfile is held against the checkout and a server.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.setup_env import ROOT
from tests import tidy
from tests.operations.commands import unknown
from tests.operations.test_monitoring import FOLDER
from tests.system.server import serving
from tests.system.test_gateway import free_port

CONTAINER = FOLDER / "container"
DOCKERFILE = (CONTAINER / "Dockerfile").read_text().replace("\\\n", "")
# What is read by others than options: the system, Python, the hub's library, our own folders.
OTHERS = ("PATH", "HOME", "PYTHONUNBUFFERED", "HF_HUB_CACHE", "ROUNDHOUSE_HOME")


def said(word: str) -> list[str]:
    """What is behind each line of the Dockerfile that begins with a word."""
    return re.findall(rf"^{word} +(.*)$", DOCKERFILE, flags=re.MULTILINE)


def variables() -> dict[str, str]:
    """What the image sets for what runs in it."""
    pairs = (pair.split("=", 1) for pair in shlex.split(said("ENV")[-1]))
    return dict(pairs)  # type: ignore[arg-type]


def test_the_image_is_made_of_all_packages_and_what_installs_them() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert {*tidy.PRODUCT, "pyproject.toml", "README.md", "LICENSE"} <= taken
    assert all((ROOT / name).exists() for name in taken)
    (compiled,) = re.findall(r"compileall -q ([a-z ]+)", DOCKERFILE)
    assert set(compiled.split()) == set(tidy.PRODUCT)


def test_its_variables_are_read_by_somebody() -> None:
    assert not unknown(variables(), "serve", OTHERS)
    assert said("EXPOSE") == [f"{variables()['PORT']} {variables()['GRPC_PORT']}"]


def test_it_is_installed_by_commands_that_exist() -> None:
    (setup,) = re.findall(r"python3 -m deploy.setup_env (.*?) &&", DOCKERFILE)
    command = [sys.executable, "-m", "deploy.setup_env", *shlex.split(setup), "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    (install,) = re.findall(r"roundhouse (engines install .*)$", DOCKERFILE, flags=re.MULTILINE)
    install = install.replace("$ENGINE", "none").replace("$DEVICE", "cpu")
    command = [sys.executable, "-m", "deploy.cli", *shlex.split(install)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "'none' is not one of" in done.stderr  # the rest of the line was understood


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ("", "text-generation-launcher"),
        ("--model-id m --port 80", "text-generation-launcher --model-id m --port 80"),
        ("gateway --router r:1", "roundhouse gateway --router r:1"),
        ("roundhouse engines", "roundhouse engines"),
        ("text-generation-launcher --env", "text-generation-launcher --env"),
    ],
)
def test_without_a_command_it_is_the_launcher(given: str, run: str, tmp_path: Path) -> None:
    for name in ("roundhouse", "text-generation-launcher"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    assert os.access(CONTAINER / "entrypoint.sh", os.X_OK)
    done = subprocess.run(
        [CONTAINER / "entrypoint.sh", *given.split()],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == run
    (entry,) = said("ENTRYPOINT")
    inside = json.loads(entry)[-1].removeprefix("/opt/roundhouse/src/")
    assert ROOT / inside == CONTAINER / "entrypoint.sh"


def test_it_is_healthy_while_its_server_is(tmp_path: Path) -> None:
    (check,) = re.findall(r"CMD (\[.*\])", said("HEALTHCHECK")[0])
    program, *arguments = json.loads(check)
    assert program == "python3"

    def healthy(port: str) -> bool:
        command, env = [sys.executable, *arguments], os.environ | {"PORT": port}
        done = subprocess.run(command, env=env, capture_output=True, check=False, timeout=30)
        return done.returncode == 0

    with serving(tmp_path, "--engine", "scripted") as server:
        assert healthy(server.rest.rpartition(":")[2])
        assert not healthy(free_port())
