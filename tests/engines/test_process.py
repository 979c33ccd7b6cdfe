"""``python -m shards`` as a process: what it prints, how it ends, and with which code."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shards import process as worker_process
from shards.config import parse
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc
from tls.before_grpc import EXPERIMENTS

PATIENCE_S = 30.0
# Longer than a worker that has nothing to wait for takes to end, and far below its limit.
SOON_S = 10.0


class Process:
    def __init__(self, folder: Path, *arguments: str) -> None:
        self.address = f"unix://{folder}/worker.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shards", "--listen", self.address, *arguments],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        )

    def hear(self, event: str) -> dict[str, object]:
        """Reads lines up to an event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            report = json.loads(line)
            if report["event"] == event:
                return report
        raise AssertionError(f"ended without {event}")

    def end(self) -> tuple[int, list[str]]:
        """Waits for the end; the exit code and the lines that were still to read."""
        assert self.process.stderr is not None
        lines = self.process.stderr.read().splitlines()
        return self.process.wait(PATIENCE_S), lines


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        started.append(Process(tmp_path, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        with process.process:
            pass


SCRIPTED = ("--engine", "scripted")


def test_reports_loading_and_readiness(start) -> None:
    worker = start(*SCRIPTED)
    assert worker.hear("loading")["fraction"] == 1.0
    ready = worker.hear("ready")
    assert ready["address"] == worker.address
    assert ready["seconds"] >= 0
    with grpc.insecure_channel(worker.address) as channel:
        told = shard_pb2_grpc.ShardStub(channel).Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
    assert told.engine == "scripted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_good_order(start, number: signal.Signals) -> None:
    worker = start(*SCRIPTED)
    worker.hear("ready")
    worker.process.send_signal(number)
    assert worker.end() == (0, [])


def test_ends_with_its_parent(start) -> None:
    worker = start(*SCRIPTED, "--exit-with-parent")
    worker.hear("ready")
    worker.process.stdin.close()
    assert worker.end() == (0, [])


def test_does_not_end_with_standard_input_unless_told(start) -> None:
    worker = start(*SCRIPTED)
    worker.process.stdin.close()
    worker.hear("ready")
    worker.process.terminate()
    assert worker.end()[0] == 0


@pytest.mark.parametrize("how", ["signal", "parent"])
def test_a_wedged_engine_cannot_hold_the_exit(start, how: str) -> None:
    options = ("--engine-option", "wedge_after_steps=1", "--graceful-termination-timeout", "0")
    worker = start(*SCRIPTED, *options, "--exit-with-parent")
    worker.hear("ready")
    with grpc.insecure_channel(worker.address) as channel:
        plans = [_plan(1), _plan(2)]
        answers = shard_pb2_grpc.ShardStub(channel).Run(iter(plans), timeout=PATIENCE_S)
        assert next(answers).plan_id == 1
        if how == "signal":
            worker.process.terminate()
        else:
            worker.process.stdin.close()
        code, _lines = worker.end()
    # 3 if the second plan was under way by then, else there was nothing to wait for.
    assert code in {0, 3}


def test_a_second_signal_ends_it_at_once(start) -> None:
    worker = start(*SCRIPTED, "--engine-option", "wedge_after_steps=1")
    worker.hear("ready")
    with grpc.insecure_channel(worker.address) as channel:
        answers = shard_pb2_grpc.ShardStub(channel).Run(iter([_plan(1), _plan(2)]))
        assert next(answers).plan_id == 1
        worker.process.terminate()
        # The message says that the first signal was heard.
        assert next(answers).leaving
        worker.process.terminate()
        assert worker.end()[0] == 128 + signal.SIGTERM
        with pytest.raises(grpc.RpcError):
            next(answers)


class Log:
    """A stream of plans for one sequence, kept open; ``answers`` are what comes."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._plans = queue.Queue[pb.Plan | None](8)
        self._sent = 0
        stub = shard_pb2_grpc.ShardStub(channel)
        self.answers = stub.Run(iter(self._plans.get, None), timeout=PATIENCE_S)

    def step(self) -> pb.Outcome:
        """Sends the next plan; the next message."""
        self._sent += 1
        self._plans.put(_plan(self._sent))
        return next(self.answers)

    def close(self) -> list[pb.Outcome]:
        """Says that no more plans come; what was still to come, if the stream ends in order."""
        self._plans.put(None)
        return list(self.answers)


@contextmanager
def log_of(worker: Process) -> Iterator[Log]:
    """A log that has been begun with a worker that is ready."""
    worker.hear("ready")
    with grpc.insecure_channel(worker.address) as channel:
        log = Log(channel)
        assert log.step().plan_id == 1
        yield log


def broken(log: Log) -> tuple[grpc.StatusCode, str]:
    """How a stream that the worker ends has ended."""
    with pytest.raises(grpc.RpcError) as caught:
        next(log.answers)
    return caught.value.code(), caught.value.details()


STOPPING = (grpc.StatusCode.UNAVAILABLE, "the worker is stopping")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_router_end_what_runs(start, number: signal.Signals) -> None:
    worker = start(*SCRIPTED)
    with log_of(worker) as log:
        worker.process.send_signal(number)
        assert next(log.answers) == pb.Outcome(epoch=1, leaving=True)
        assert worker.hear("leaving")["limit_s"] == 90
        assert log.step().plan_id == 2
        with grpc.insecure_channel(worker.address) as other:
            health = health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        began = time.monotonic()
        assert log.close() == []
        assert worker.end() == (0, [])
        assert time.monotonic() - began < SOON_S


def test_a_router_that_does_not_let_go_is_waited_for_so_long(start) -> None:
    worker = start(*SCRIPTED, "--graceful-termination-timeout", "0.3")
    with log_of(worker) as log:
        began = time.monotonic()
        worker.process.terminate()
        assert next(log.answers).leaving
        assert broken(log) == STOPPING
        assert time.monotonic() - began >= 0.3
        assert worker.hear("leaving")["limit_s"] == 0.3
        assert worker.end() == (0, [])


@pytest.mark.parametrize("signal_first", [True, False])
def test_the_parents_end_does_not_wait_for_the_router(start, signal_first: bool) -> None:
    worker = start(*SCRIPTED, "--exit-with-parent")
    with log_of(worker) as log:
        if signal_first:
            worker.process.terminate()
            assert next(log.answers).leaving
        worker.process.stdin.close()
        assert broken(log) == STOPPING
        assert worker.end()[0] == 0


def test_a_signal_after_the_parents_end_is_a_first_one(start) -> None:
    """Who ends a worker closes its input and sends a signal, and either may be heard first."""
    worker = start(*SCRIPTED, "--exit-with-parent")
    worker.hear("ready")
    with grpc.insecure_channel(worker.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        worker.process.stdin.close()
        # It stops now, and lets calls that are open end, as this one never does.
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        worker.process.terminate()
        assert worker.end() == (0, [])


def test_an_engine_that_is_lost_while_the_worker_leaves_is_told(start) -> None:
    worker = start(*SCRIPTED, "--engine-option", "lost_after_steps=1")
    with log_of(worker) as log:
        worker.process.terminate()
        assert next(log.answers).leaving
        with pytest.raises(grpc.RpcError) as caught:
            log.step()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "loses its device" in str(worker.hear("error")["message"])
        assert worker.end()[0] == 3


def test_a_worker_that_loads_leaves_at_once(start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "template")  # reading it takes until somebody writes
    worker = start(*SCRIPTED, "--chat-template", str(tmp_path / "template"))
    worker.hear("listening")
    with grpc.insecure_channel(worker.address) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)
        call = stub.Describe.future(pb.DescribeRequest(), timeout=PATIENCE_S)
        # The same connection brings this one after it.
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        began = time.monotonic()
        worker.process.terminate()
        assert worker.end() == (0, [])
        assert time.monotonic() - began < SOON_S
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def _plan(plan_id: int) -> pb.Plan:
    admits = [pb.Admit(sequence=1, tokens=[1], prompt_len=1)] if plan_id == 1 else []
    return pb.Plan(epoch=1, plan_id=plan_id, admits=admits, work_sequences=[1], work_tokens=[1])


@pytest.mark.parametrize(
    ("option", "code", "error"),
    [("lost_after_steps=1", 3, "loses its device"), ("crash_after_steps=1", 70, None)],
)
def test_the_loss_of_the_engine_ends_the_process(
    start, option: str, code: int, error: str | None
) -> None:
    worker = start(*SCRIPTED, "--engine-option", option)
    worker.hear("ready")
    with grpc.insecure_channel(worker.address) as channel:
        answers = shard_pb2_grpc.ShardStub(channel).Run(iter([_plan(1), _plan(2)]))
        with pytest.raises(grpc.RpcError):
            list(answers)
    ended, lines = worker.end()
    assert ended == code
    assert len(lines) == (error is not None)
    assert error is None or error in lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engine", "nope"), 2, "invalid choice: 'nope'"),
        ((), 2, "required: --engine"),
        ((*SCRIPTED, "--kv-tokens", "-5"), 2, "-5 is not a whole number"),
        ((*SCRIPTED, "--rank", "2", "--world", "2"), 2, "--rank 2 is not below --world 2"),
        ((*SCRIPTED, "--graceful-termination-timeout", "nan"), 2, "nan is not a number from 0 to"),
        ((*SCRIPTED, "--graceful-termination-timeout", "soon"), 2, "soon is not a number from 0"),
        ((*SCRIPTED, "--engine-option", "step_ms"), 2, "step_ms is not key=value"),
        ((*SCRIPTED, "--engine-option", "speed=1"), 1, "unknown engine option speed"),
        ((*SCRIPTED, "--listen", "nowhere"), 2, "neither unix:///path nor HOST:PORT"),
        ((*SCRIPTED, "--listen", "unix:///no/such/folder/x"), 1, "cannot listen on unix:///no"),
        (("--engine", "llamacpp", "--model", "/no/such.gguf"), 1, "/no/such.gguf: does not exist"),
        (("--engine", "llamacpp"), 1, "--model PATH is missing"),
    ],
)
def test_a_mistake_is_one_line(start, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended, lines = start(*arguments).end()
    assert ended == code
    reports = [json.loads(line) for line in lines]
    errors = [report["message"] for report in reports if report["event"] == "error"]
    assert len(errors) == 1
    assert message in errors[0]


def test_only_the_chosen_engine_is_imported() -> None:
    program = (
        "import sys; from shards import engines; from shards.engines.base import EngineOptions;"
        "engines.load('scripted', EngineOptions(None, 'x'), print);"
        "sys.exit('llama_cpp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=PATIENCE_S)
    assert done.returncode == 0


def test_a_missing_package_is_named_with_what_to_do() -> None:
    program = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "from shards import engines\n"
        "from shards.engines.base import EngineOptions, ModelError\n"
        "try: engines.load('llamacpp', EngineOptions(None, 'x'), print)\n"
        "except ModelError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=PATIENCE_S,
        capture_output=True,
        text=True,
    )
    assert done.stdout == (
        "engine llamacpp needs the package llama_cpp, which is not installed;"
        " try: roundhouse engines install llamacpp\n"
    )


def test_a_chat_template_of_ones_own_takes_the_place_of_the_models(start, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}!")
    process = start("--engine", "scripted", "--chat-template", str(template))
    process.hear("ready")
    with grpc.insecure_channel(process.address) as channel:
        chunks = shard_pb2_grpc.ShardStub(channel).GetTokenizer(pb.GetTokenizerRequest())
        files = {chunk.name: chunk.data for chunk in chunks}
    assert files["chat_template.jinja"] == b"{{ messages[0].content }}!"
    assert "tokenizer.json" in files


def test_a_chat_template_that_is_not_there_is_one_line(start, tmp_path: Path) -> None:
    missing = tmp_path / "none.jinja"
    process = start("--engine", "scripted", "--chat-template", str(missing))
    assert str(missing) in str(process.hear("error")["message"])
    assert process.end()[0] == 1


def test_an_engine_has_a_grpc_of_its_own_as_that_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[str | None] = []
    monkeypatch.setenv(EXPERIMENTS, "ours")
    monkeypatch.setattr(
        worker_process.engines, "load", lambda *_: found.append(os.environ.get(EXPERIMENTS))
    )
    worker_process._make(parse(["--engine", "scripted", "--listen", "unix:///w"]))
    assert found == [None]
