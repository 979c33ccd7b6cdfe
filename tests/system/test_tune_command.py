"""``roundhouse tune`` as users start it: real servers of the scripted engine."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.tune_server import last_trouble, loaded_share
from tests.system.server import alive, children, eventually, serving

# ``roundhouse``, with the shortest windows however much time there is: a busy machine may take long
# to load a candidate, and that is not what these tests are about.
QUICK = """
import deploy.cli, deploy.tune
deploy.tune.WINDOW_MAX_S = deploy.tune.WINDOW_MIN_S
deploy.cli.main()
"""
AMPLE = ("--minutes", "5")


def command(*arguments: str, program: tuple[str, str] = ("-m", "deploy.cli")) -> list[str]:
    shape = ("--prompt-tokens", "16", "--new-tokens", "8", "--concurrency", "3")
    return [sys.executable, *program, "tune", *shape, *arguments]


def tune(
    folder: Path, *arguments: str, program: str = QUICK, **env: str
) -> subprocess.CompletedProcess[str]:
    output = ("--output", str(folder / "best.toml"))
    return subprocess.run(
        command(*output, *arguments, program=("-c", program)),
        env=os.environ | {"TMPDIR": str(folder)} | env,
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_the_faster_candidate_wins_and_serve_takes_the_file(tmp_path: Path) -> None:
    slow, fast = ("scripted,engine-option=step_ms=100", "scripted,engine-option=step_ms=6")
    # Options of a server that are in the environment are not the candidates'.
    result = tune(
        *(tmp_path, "--try", slow, "--try", fast, *AMPLE),
        ENGINE="abacus", API_KEY="secret", MAX_CONCURRENT_REQUESTS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1][:3] == ["*", "scripted", "step_ms=6"]
    assert rows[2][:2] == ["scripted", "step_ms=100"]
    # Three sequences draw one token in each step: 500 and 30 a second, less what requests cost and
    # what a busy machine takes. More come in a window only if they were late for the one before.
    fast_s, slow_s = float(rows[1][3]), float(rows[2][2])
    assert 5 < slow_s < 36
    assert fast_s > 1.5 * slow_s
    assert f"serve --config {tmp_path / 'best.toml'}" in result.stdout
    assert (tmp_path / "best.svg").read_text().startswith("<svg")
    assert not list(tmp_path.glob("roundhouse-*")), "sockets and candidates are cleared away"

    with serving(tmp_path, "--config", str(tmp_path / "best.toml")) as server:
        body = {"prompt": "Hello", "max_tokens": 4}
        assert server.client.post("/v1/completions", json=body).status_code == 200

    # Again: nothing but the new candidate is measured.
    third = "scripted,engine-option=step_ms=30"
    again = tune(tmp_path, "--try", slow, "--try", fast, "--try", third, *AMPLE)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("measured before") == 2
    assert again.stderr.count("loading ...") == 1
    assert len(json.loads((tmp_path / "best.json").read_text())) == 3


def test_a_candidate_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    bad = "scripted,engine-option=no_such=1"
    dying = "scripted,engine-option=crash_after_steps=2"
    fine = "scripted,engine-option=step_ms=6"
    result = tune(tmp_path, "--try", bad, "--try", dying, "--try", fine, *AMPLE)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[-1 if "*" in line else 1]: line for line in result.stdout.splitlines()[:4]}
    assert "unknown engine option no_such" in rows["no_such=1"]
    assert rows["crash_after_steps=2"].split()[2] == "-"
    assert "worker 0: " in rows["crash_after_steps=2"], "why it died, not what a client saw of it"
    assert tomllib.loads((tmp_path / "best.toml").read_text())["engine-option"] == ["step_ms=6"]


def test_why_a_server_failed_is_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_trouble(log) == ""
    failed = {"level": "ERROR", "message": "request failed", "error": "Traceback\nKeyError: 'x'"}
    said = ["a line", "[1]", json.dumps({"level": "INFO", "message": "group g is up"})]
    log.write_text("\n".join((*said, json.dumps(failed), "worker 0: loading, 40%", "")))
    assert last_trouble(log) == "request failed: KeyError: 'x'"
    assert loaded_share(log) == ["40%"]
    death = "worker 1: killed by SIGKILL (death 4 in a row); starting all 2 ranks again in 0.5 s"
    with log.open("a") as file:
        file.write(json.dumps({"level": "INFO", "message": death}) + "\n")
    assert last_trouble(log) == "worker 1: killed by SIGKILL"


def test_a_candidate_that_loads_for_too_long_leaves_time_for_the_others(tmp_path: Path) -> None:
    slow, fine = [f"scripted,engine-option=step_ms={ms}" for ms in (5, 6)]
    result = tune(
        *(tmp_path, "--try", slow, "--try", fine, *AMPLE),
        program=f"import deploy.tune\ndeploy.tune.LOAD_SHARE = 1e-4\n{QUICK}",
    )
    assert result.returncode == 0, result.stderr
    best, late = result.stdout.splitlines()[1:3]
    assert best.split()[:3] == ["*", "scripted", "step_ms=6"]
    assert "step_ms=5" in late
    assert "not ready after 0 s, which was its share of the time; --minutes gives more" in late
    assert "--minutes gives more, and goes on from here" in result.stderr
    assert not list(tmp_path.glob("roundhouse-*")), "the one that was given up is cleared away"


def test_an_engine_whose_tokens_are_rare_is_measured_all_the_same(tmp_path: Path) -> None:
    slow = "scripted,engine-option=step_ms=1500"
    result = tune(
        *(tmp_path, "--try", slow, *AMPLE),
        program=f"import deploy.tune\ndeploy.tune.WINDOW_MIN_S = 0.5\n{QUICK}",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1].startswith("*  scripted step_ms=1500")


def test_if_nothing_can_be_measured_the_first_reason_is_the_error(tmp_path: Path) -> None:
    result = tune(tmp_path, "--try", "scripted,engine-option=no_such=1", "--minutes", "0.3")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("roundhouse: error: nothing could be measured: ")
    assert "unknown engine option no_such" in last
    assert "{" not in last, "the server's line is for people here, not the object that it came as"
    assert not (tmp_path / "best.toml").exists()


def test_what_the_server_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    result = tune(tmp_path, "--try", "scripted,engine-option=length_max=12", *AMPLE)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    told = "the server answered 400: `prompt` must have less than 12 tokens. Given: 16"
    assert last == f"roundhouse: error: nothing could be measured: {told}"


def test_what_has_no_time_left_is_said(tmp_path: Path) -> None:
    first, *others = [("--try", f"scripted,engine-option=step_ms={ms}") for ms in (5, 6, 7)]
    measured = tune(tmp_path, *first, *AMPLE)
    assert measured.returncode == 0, measured.stderr
    assert "the time was up" not in measured.stdout + measured.stderr
    # What is known takes no time; there is less left than any measurement takes.
    tries = [part for pair in (first, *others) for part in pair]
    result = tune(tmp_path, *tries, "--minutes", "0.1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the time was up before its turn") == 2
    assert "--minutes gives more" in result.stderr


@contextmanager
def measuring(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A call that is in the middle of a measurement, and what it has started: server and worker."""
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(
            command("--try", "scripted,engine-option=step_ms=6", "--output", str(folder / "b")),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        started: list[int] = []
        try:
            said = folder / "stderr"
            eventually(lambda: "measuring" in said.read_text(), within_s=60)
            (server,) = children(process.pid)
            started = [server, *children(server)]
            assert len(started) == 2
            yield process, started
        finally:
            process.kill()
            process.wait()
            for pid in filter(alive, started):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    with measuring(tmp_path) as (process, started):
        process.send_signal(number)
        process.send_signal(number)  # in a hurry
        assert process.wait(30) == 130
        eventually(lambda: not any(map(alive, started)))
    said = (tmp_path / "stderr").read_text().splitlines()
    assert said[-1].startswith("tune: interrupted; what was measured is")
    assert not list(tmp_path.glob("roundhouse-*"))


def test_not_even_kill_9_leaves_anything_running(tmp_path: Path) -> None:
    with measuring(tmp_path) as (process, started):
        process.kill()
        eventually(lambda: not any(map(alive, started)))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("./no-such.gguf",), "model file ./no-such.gguf does not exist"),
        (("--try", "abacus"), "there is no engine abacus"),
        (("--try", "scripted,color=red"), "'color=red' is not OPTION=VALUE"),
        (("--engine", "trtllm", "some/model"), "trtllm cannot run here: "),
        (("--output", "/no/such/folder/x.toml", "--try", "scripted"), "/no/such/folder"),
        (("--concurrency", "0"), "concurrency"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    result = subprocess.run(
        command("--minutes", "0.3", *arguments),
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode not in (0, -6, -11)
    (line,) = [text for text in result.stderr.splitlines() if not text.startswith("tune: ")]
    assert line.startswith("roundhouse: error: ")
    assert told in line
