"""What the person at the terminal reads."""

import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from deploy.console import Console, Urls
from deploy.groups import LocalGroup
from deploy.keeper import Died, Loading, Ready, Said
from deploy.models import Model
from deploy.workers import WorkerOptions


@pytest.mark.parametrize(
    ("host", "rest", "grpc"),
    [
        ("0.0.0.0", "http://localhost:1", "localhost:2"),
        ("::", "http://localhost:1", "localhost:2"),
        ("::1", "http://[::1]:1", "[::1]:2"),
        ("10.0.0.7", "http://10.0.0.7:1", "10.0.0.7:2"),
    ],
)
def test_urls_are_what_a_client_would_write(host: str, rest: str, grpc: str) -> None:
    assert Urls.of(host, 1, 2) == Urls(rest, grpc)


def test_a_crash_loop_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=False)
    console.tell(Died("worker 0", "killed by SIGSEGV", 1, 0.1))
    console.tell(Died("worker 0", "killed by SIGSEGV", 4, 2.0))
    assert capsys.readouterr().err.splitlines() == [
        "worker 0: killed by SIGSEGV; starting it again in 0.1 s",
        "worker 0: killed by SIGSEGV (death 4 in a row); starting it again in 2 s",
    ]


def test_what_happens_while_it_serves_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    console = Console(as_json=False)
    console.ready(Urls.of("0.0.0.0", 3000, 50051), "tiny", None)
    console.tell(Died("worker 0", "killed by SIGSEGV", 1, 0.1))
    console.tell(Ready("worker 0", 1.25, again=True))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "worker 0: killed by SIGSEGV; starting it again in 0.1 s"),
        ("INFO", "worker 0: is back after a restart, loaded in 1.2 s"),
    ]


def test_a_lost_rank_says_that_all_start_again(capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=False).tell(Died("torch worker 1", "killed by SIGKILL", 1, 0.1, ranks=2))
    assert capsys.readouterr().err == (
        "torch worker 1: killed by SIGKILL; starting all 2 ranks of its group again in 0.1 s\n"
    )


def test_what_is_served_is_said_with_how_it_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(None, "m", "m-Q8_0.gguf, one of 2 files")
    one = LocalGroup("llamacpp", model, WorkerOptions("llamacpp"))
    two = LocalGroup("big", Model(None, "m"), WorkerOptions("torch", world=2))
    console = Console(as_json=False)
    console.serving([one])
    console.serving([one, two])
    assert capsys.readouterr().err.splitlines() == [
        "serving m (m-Q8_0.gguf, one of 2 files)",
        "serving m by 2 groups",
        "serving m: group llamacpp: 1 x llamacpp, m-Q8_0.gguf, one of 2 files",
        "serving m: group big: 2 x torch",
    ]


def test_away_from_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=False)
    for fraction in (0.1, 0.5, 1.0):
        console.tell(Loading("worker 0", fraction))
    console.tell(Ready("worker 0", 1.25, again=False))
    console.tell(Ready("worker 0", 1.25, again=True))
    console.close()
    assert capsys.readouterr().err.splitlines() == [
        "worker 0: loaded in 1.2 s",
        "worker 0: is back after a restart, loaded in 1.2 s",
    ]


def test_away_from_a_terminal_a_slow_worker_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.9, 5.0, 6.0, 10.1])
    monkeypatch.setattr("deploy.console.monotonic", lambda: next(clock))
    console = Console(as_json=False)
    for fraction in (0.1, 0.2, 0.3, 0.4, 0.5):
        console.tell(Loading("worker 0", fraction))
    console.close()
    assert capsys.readouterr().err.splitlines() == [
        "worker 0: loading, 30%",
        "worker 0: loading, 50%",
    ]


def test_json_output_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.tell(Said("worker 0", "line"))
    console.ready(Urls.of("0.0.0.0", 3000, 50051), "tiny", None)
    shown = capsys.readouterr()
    line = json.loads(shown.err)
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == timedelta(0)
    assert line == {"level": "INFO", "target": "roundhouse", "message": "worker 0: line"}
    assert json.loads(shown.out) == {
        "event": "ready",
        "rest": "http://localhost:3000",
        "grpc": "localhost:50051",
        "model": "tiny",
    }


def test_the_ready_text_asks_for_the_key_if_there_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console(as_json=False).ready(Urls.of("0.0.0.0", 3000, 50051), "tiny", "secret")
    shown = capsys.readouterr().out
    assert "Authorization: Bearer YOUR_KEY" in shown
    assert "secret" not in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_ready_text_that_cannot_be_written_is_given_up() -> None:
    code = "from deploy.console import *; Console(as_json=False).ready(Urls('a', 'b'), 'm', None)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")
