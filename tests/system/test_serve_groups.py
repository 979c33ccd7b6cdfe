"""``roundhouse serve`` with groups of ranks, and with several groups, as processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from tests.system.server import (
    REQUEST_S,
    STOP_S,
    Server,
    alive,
    children,
    end,
    eventually,
    read_lines,
    serving,
)
from tests.system.test_serve import ENDLESS, SHORT, answers, data

RANKS = ("--engine", "scripted", "--engine-option", "step_ms=5", "--num-shard", "2")
DOWN_S = 5.0


@contextmanager
def watched(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server; when it has ended, nothing that it ever started is left, and no socket."""
    with serving(folder, *arguments) as server:
        yield server
        left = children(server.process.pid)
    assert left
    assert not any(map(alive, left))
    assert not list(folder.glob("roundhouse-*"))


def steps(server: Server) -> dict[str, float]:
    """How many steps each group has done."""
    found = {}
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("roundhouse_step_seconds_count{"):
            found[line.partition('group="')[2].partition('"')[0]] = float(line.split()[-1])
    return found


def groups_up(server: Server) -> float:
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith("roundhouse_groups_up "):
            return float(line.split()[1])
    raise AssertionError("the metric is missing")


def generate(server: Server, body: dict[str, Any] = SHORT) -> httpx.Response:
    return server.client.post("/generate", json=body)


def test_killing_either_rank_takes_the_group_down_and_it_comes_back(tmp_path: Path) -> None:
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 300}}
    with watched(tmp_path, *RANKS) as server:
        whole = generate(server, body).json()["generated_text"]
        seen: set[int] = set()
        for place in (0, 1):
            ranks = children(server.process.pid)
            assert len(ranks) == 2
            assert not seen & set(ranks)
            seen |= set(ranks)
            with server.client.stream("POST", "/generate_stream", json=body) as response:
                lines = (line for line in response.iter_lines() if line)
                assert "token" in data(next(lines))
                began = monotonic()
                os.kill(ranks[place], signal.SIGKILL)
                eventually(lambda: not any(map(alive, ranks)), DOWN_S)  # noqa: B023
                assert monotonic() - began < DOWN_S
                last = data(list(lines)[-1])
            assert last["generated_text"] == whole
    assert not any(map(alive, seen))
    told = (tmp_path / "stderr").read_text()
    assert "killed by SIGKILL; starting all 2 ranks of its group again" in told
    assert told.count("worker 1: is back after a restart") == 2


def test_ranks_that_lose_their_engine_come_back_together(tmp_path: Path) -> None:
    """Ten steps are too little for the answer to have got on since the loss before."""
    with watched(tmp_path, *RANKS, "--engine-option", "crash_after_steps=10") as server:
        first = children(server.process.pid)
        with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
            lines = [line for line in response.iter_lines() if line]
        assert data(lines[-1])["error_type"] == "generation"
        assert answers(server)
        assert not set(first) & set(children(server.process.pid))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*RANKS, "--engine-option", "bogus=1"), "bogus"),
        (
            ("--engine", "llamacpp", "--num-shard", "2"),
            "llamacpp: cannot be one of several ranks: start it with --num-shard 1",
        ),
        (("--group", "scripted", "--group", "scripted,engine-option=bogus=1"), "scripted-2 worker"),
    ],
    ids=["faulty", "cannot be split", "second group"],
)
def test_a_worker_that_cannot_start_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    command = [sys.executable, "-m", "deploy.cli", "serve", *arguments]
    env = os.environ | {"PORT": "0", "GRPC_PORT": "0", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("roundhouse: error: ")]
    assert line == done.stderr.splitlines()[-1]
    assert told in line
    assert not list(tmp_path.glob("roundhouse-*"))


def interpreter(folder: Path) -> Path:
    """A Python that can be taken away, so that a group stays down until it is put back."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def test_two_groups_serve_one_model_and_one_goes_on_alone(tmp_path: Path) -> None:
    python = interpreter(tmp_path)
    groups = (
        *("--group", "scripted,name=a,engine-option=step_ms=5"),
        *("--group", f"scripted,name=b,num-shard=2,worker-python={python},engine-option=step_ms=6"),
    )
    with watched(tmp_path, "some/model", *groups) as server, ThreadPoolExecutor(8) as pool:
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == [
            "some/model"
        ]
        bodies = [
            {"inputs": f"Count {number}", "parameters": {"max_new_tokens": 60}}
            for number in range(8)
        ]
        assert all(done.is_success for done in pool.map(lambda one: generate(server, one), bodies))
        before = steps(server)
        assert before["a"] > 0
        assert before["b"] > 0
        python.rename(tmp_path / "away")
        victims = with_words(server, "step_ms=6")
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        eventually(lambda: not any(map(alive, victims)), DOWN_S)
        eventually(lambda: groups_up(server) == 1, DOWN_S)
        assert all(done.is_success for done in pool.map(lambda one: generate(server, one), bodies))
        after = steps(server)
        assert after["a"] > before["a"]
        eventually(lambda: f"cannot run {python}" in (tmp_path / "stderr").read_text())
        (tmp_path / "away").rename(python)
        eventually(lambda: groups_up(server) == 2)


def with_words(server: Server, words: str) -> list[int]:
    """The workers with these words on their command line."""
    return [pid for pid in children(server.process.pid) if words in command_line(pid)]


def command_line(pid: int) -> str:
    """The command of a process. Small images lack ``ps``."""
    path = Path(f"/proc/{pid}/cmdline")
    if path.exists():
        return path.read_bytes().replace(b"\0", b" ").decode()
    command = ["ps", "-o", "args=", "-p", str(pid)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_group_with_another_vocabulary_is_refused_by_name_and_the_other_serves(
    tmp_path: Path,
) -> None:
    """Two engines under one name: the embedded model beside one that makes up its text."""
    groups = ("--group", "llamacpp,threads=1", "--group", "scripted", "--served-model-name", "m")
    with watched(tmp_path, *groups) as server:
        told = tmp_path / "stderr"
        eventually(lambda: "group scripted is down: group llamacpp serves m" in told.read_text())
        assert "give one of them a router of its own" in told.read_text()
        assert groups_up(server) == 1
        assert generate(server).is_success


def test_a_config_file_starts_it(tmp_path: Path) -> None:
    file = tmp_path / "roundhouse.toml"
    file.write_text(
        "model = 'mine'\nengine = 'scripted'\nmax-total-tokens = 128\n"
        "[[group]]\nnum-shard = 2\nengine-option = { step_ms = 5 }\n[[group]]\n"
    )
    with watched(tmp_path, "--config", str(file), "--max-total-tokens", "64") as server:
        info = server.client.get("/info").json()
        assert (info["model_id"], info["max_total_tokens"]) == ("mine", 64)
        assert len(children(server.process.pid)) == 3
        assert generate(server).is_success


def test_ranks_that_run_apart_form_one_group(tmp_path: Path) -> None:
    """What is typed on two machines for the two ranks of one model, and the router on a third."""
    command = [sys.executable, "-m", "deploy.cli"]
    addresses = [f"unix://{tmp_path}/{rank}.sock" for rank in (0, 1)]
    with (tmp_path / "stderr").open("w") as errors:
        workers = [
            subprocess.Popen(
                [*command, "worker", "--engine", "scripted", "--listen", address, "--rank",
                 str(rank), "--world", "2", "--rendezvous", "127.0.0.1:29400"],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
            for rank, address in enumerate(addresses)
        ]  # fmt: skip
        router = subprocess.Popen(
            [*command, "router", "--worker", ",".join(reversed(addresses)), "--port", "0",
             "--grpc-port", "0", "--hostname", "127.0.0.1", "--json-output"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )  # fmt: skip
        try:
            ready = json.loads(read_lines(router, lambda line: line.startswith("{"))[-1])
            answer = httpx.post(f"{ready['rest']}/generate", json=SHORT, timeout=REQUEST_S)
            assert answer.status_code == 200
        finally:
            end(router)
            for worker in workers:
                worker.terminate()
            assert [worker.wait(STOP_S) for worker in workers] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--world", "2"), "--world 2 needs --rendezvous HOST:PORT, the same for every rank"),
        (("--world", "2", "--rank", "2", "--rendezvous", "h:1"), "--rank 2 is not below --world 2"),
        (("--world", "2", "--rendezvous", "h"), "h is not HOST:PORT"),
        (("--worker-python", "/no/python"), "cannot run /no/python"),
        (("--adapter", "a"), "--adapter a is not NAME=PATH"),
    ],
)
def test_a_mistake_in_a_worker_s_options_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    command = [sys.executable, "-m", "deploy.cli", "worker", "--engine", "scripted"]
    done = subprocess.run(
        [*command, "--listen", f"unix://{tmp_path}/s", *arguments],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert told in line
