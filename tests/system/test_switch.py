"""One engine in the place of another under live streams, by the commands that users type."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.models import embedded
from tests.system.server import (
    STOP_S,
    Server,
    alive,
    children,
    end,
    eventually,
    ready,
    serving,
    start_router,
)
from tests.system.test_cli import only_line, roundhouse

SLOW = ("--group", "scripted,name=first,engine-option=step_ms=20")
"""So slow that an answer of some hundred tokens outlasts the start of another worker."""
TOKENS = 500
STREAMS = 6


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / "control"))


def change(server: Server, *words: str) -> subprocess.CompletedProcess[str]:
    return roundhouse(*words, PORT=server.rest.rpartition(":")[2])


def names(server: Server) -> list[str]:
    shown = change(server, "groups", "--json")
    assert shown.returncode == 0, shown.stderr
    return [group["name"] for group in json.loads(shown.stdout)["groups"]]


def streamed(server: Server, body: dict[str, Any], heard: Callable[[], object]) -> list[int]:
    """The token ids of a stream; ``heard`` is called at each. Fails if it breaks off."""
    tokens: list[int] = []
    finish = None
    with server.client.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.status_code == 200
        for line in filter(None, answer.iter_lines()):
            event = json.loads(line.removeprefix("data:"))
            assert "error" not in event, event
            tokens.append(event["token"]["id"])
            finish = event["details"] and event["details"]["finish_reason"]
            heard()
    assert finish
    return tokens


def completed(server: Server, body: dict[str, Any], heard: Callable[[], object]) -> list[int]:
    """As ``streamed``, for ``/v1/completions``, which tells how many tokens there were."""
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    tokens: list[int] = []
    with server.client.stream("POST", "/v1/completions", json=asked) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                if event["usage"]:
                    tokens.append(event["usage"]["completion_tokens"])
                heard()
    return tokens


Read = Callable[[Server, dict[str, Any], Callable[[], object]], list[int]]


class Streams:
    """Streams that run at once. ``bodies`` are what each asks for, ``read`` follows one."""

    def __init__(
        self, server: Server, bodies: list[dict[str, Any]], pool: ThreadPoolExecutor, read: Read
    ):
        self.begun = [threading.Event() for _ in bodies]
        self.answers: list[Future[list[int]]] = [
            pool.submit(read, server, body, begun.set)
            for body, begun in zip(bodies, self.begun, strict=True)
        ]
        for begun in self.begun:
            assert begun.wait(STOP_S)

    def all_run(self) -> bool:
        """Whether none has ended yet."""
        return not any(answer.done() for answer in self.answers)

    def tokens(self) -> list[list[int]]:
        """What each has said, at its end."""
        return [answer.result(2 * STOP_S) for answer in self.answers]


@contextmanager
def streaming(
    server: Server, bodies: list[dict[str, Any]], read: Read = streamed
) -> Iterator[Streams]:
    """Streams that have all begun."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        yield Streams(server, bodies, pool, read)


def counting(tokens: int = TOKENS) -> list[dict[str, Any]]:
    """One question for each stream, no two of which begin alike."""
    parameters = {"max_new_tokens": tokens, "details": True}
    return [{"inputs": f"{n} is where to begin", "parameters": parameters} for n in range(STREAMS)]


def unbroken(server: Server, bodies: list[dict[str, Any]]) -> list[list[int]]:
    """What the present engine says to the same questions."""
    with streaming(server, bodies) as streams:
        return streams.tokens()


def test_streams_go_on_token_by_token_while_the_engine_is_switched(tmp_path: Path) -> None:
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        with streaming(server, counting()) as streams:
            done = change(server, "switch", "scripted,name=second")
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip().endswith("in the place of: first")
            eventually(lambda: not alive(former))
            tokens = streams.tokens()
        assert names(server) == ["second"]
        assert tokens == unbroken(server, counting())
        assert "roundhouse_moves_total 6.0" in server.client.get("/metrics").text


def test_a_switch_that_fails_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        with streaming(server, counting(200)) as streams:
            failed = change(server, "switch", "scripted,engine-option=nonsense=1")
            assert "unknown engine option nonsense" in only_line(failed)
            assert failed.returncode == 1
            assert names(server) == ["first"]
            assert streams.all_run()
            tokens = streams.tokens()
        assert server.worker_pid() == former
        assert tokens == unbroken(server, counting(200))


def test_a_group_that_fails_at_its_first_steps_takes_nobodys_place(tmp_path: Path) -> None:
    """It loads, and its process ends as soon as it is to compute."""
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        with streaming(server, counting(100)) as streams:
            failed = change(server, "switch", "scripted,engine-option=crash_after_steps=1")
            assert "it fails at its first steps" in only_line(failed)
            assert names(server) == ["first"]
            streams.tokens()
        eventually(lambda: children(server.process.pid) == [former])


def test_with_stop_first_streams_wait_and_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        with streaming(server, counting()) as streams:
            done = change(server, "switch", "scripted,name=second", "--stop-first")
            assert done.returncode == 0, done.stderr
            assert not alive(former)
            tokens = streams.tokens()
        assert names(server) == ["second"]
        assert tokens == unbroken(server, counting())


def test_with_stop_first_probes_find_a_healthy_server_all_the_time(tmp_path: Path) -> None:
    with serving(tmp_path, *SLOW) as server, ThreadPoolExecutor() as pool:
        former, seen = server.worker_pid(), list[int]()
        done = pool.submit(change, server, "switch", "scripted,name=second", "--stop-first")
        while not done.done():
            seen.append(server.client.get("/health").status_code)
        assert done.result().returncode == 0, done.result().stderr
        assert not alive(former)
        assert set(seen) == {200}


def test_with_stop_first_a_failure_brings_the_former_group_back(tmp_path: Path) -> None:
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        with streaming(server, counting()) as streams:
            failed = change(server, "switch", "scripted,engine-option=nonsense=1", "--stop-first")
            assert "unknown engine option nonsense" in only_line(failed)
            assert "the former groups serve again: first" in only_line(failed)
            assert names(server) == ["first"]
            assert not alive(former)
            tokens = streams.tokens()
        assert tokens == unbroken(server, counting())


@pytest.mark.parametrize("group", ["scripted", "scripted,engine-option=nonsense=1"])
def test_streams_that_wait_for_a_group_end_before_the_server_does(
    tmp_path: Path, group: str
) -> None:
    with serving(tmp_path, *SLOW) as server:
        former = server.worker_pid()
        whole = unbroken(server, counting(100))
        with streaming(server, counting(100)) as streams, ThreadPoolExecutor() as pool:
            done = pool.submit(change, server, "switch", group, "--stop-first")
            eventually(lambda: not alive(former))
            assert streams.all_run()
            server.signal(signal.SIGTERM)
            assert streams.tokens() == whole
            assert server.wait() == 0
            assert done.result().returncode in (0, 1)


def test_a_real_model_goes_on_in_another_worker(tmp_path: Path) -> None:
    """llama.cpp with other settings takes the place of llama.cpp, with the same weights."""
    model = embedded()
    assert model is not None
    question = {
        "prompt": "Once upon a time",
        "max_tokens": 160,
        "temperature": 0,
        "ignore_eos": True,
    }
    with serving(tmp_path, "--group", "llamacpp,name=first,threads=1") as server:
        with streaming(server, [question], completed) as streams:
            done = change(server, "switch", "llamacpp,name=second,threads=2,kv-tokens=2048")
            assert done.returncode == 0, done.stderr
            assert streams.tokens() == [[160]]
        assert names(server) == ["second"]


@contextmanager
def worker(folder: Path, name: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A worker as users start it; its address and its process."""
    address = f"unix://{folder}/{name}.sock"
    script = ("--engine", "scripted", "--served-model-name", "m", "--engine-option", "step_ms=10")
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "worker", *script, "--listen", address],
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            eventually(lambda: '"ready"' in (folder / f"{name}.log").read_text())
            yield address, process
        finally:
            end(process)


def test_a_worker_that_is_told_to_leave_hands_its_streams_over(tmp_path: Path) -> None:
    with (
        worker(tmp_path, "a") as (one, first),
        worker(tmp_path, "b") as (two, _),
        (tmp_path / "stderr").open("w") as errors,
    ):
        process = start_router(("--worker", one, "--worker", two), errors)
        try:
            server = Server(process, ready(process, tmp_path / "stderr"))
            eventually(lambda: "roundhouse_groups_up 2.0" in server.client.get("/metrics").text)
            with streaming(server, counting(400)) as streams:
                first.send_signal(signal.SIGTERM)
                assert first.wait(STOP_S) == 0
                assert streams.all_run()
                tokens = streams.tokens()
            assert tokens == unbroken(server, counting(400))
            server.client.close()
        finally:
            end(process)
