"""``roundhouse serve`` as processes, with the scripted engine: start, loss, restart, end."""

import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from router.v1.router_pb2 import GenerateRequest, Parameters
from router.v1.router_pb2_grpc import InferenceStub
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
    start,
)

SCRIPTED = ("--engine", "scripted", "--engine-option", "step_ms=5")
ENDLESS = {"inputs": "Count", "parameters": {"max_new_tokens": 3000}}
SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 8}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("scripted"), *SCRIPTED) as server:
        yield server


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that ends the streams of a worker that is lost."""
    with serving(tmp_path_factory.mktemp("strict"), *SCRIPTED, "--no-resume-streams") as server:
        yield server


def data(line: str) -> Any:
    return json.loads(line.removeprefix("data:"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def answers(server: Server) -> bool:
    return server.client.post("/generate", json=SHORT).status_code == 200


def test_the_ready_text_has_a_line_to_copy_that_works(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as errors:
        process = start(SCRIPTED, errors)
        try:
            shown = read_lines(process, lambda line: line.endswith("}'"))
            text = "\n".join(shown)
            words = shlex.split(text[text.index("curl ") :].replace("\\\n", " "))
            url = next(word for word in words if word.startswith("http"))
            body = json.loads(words[words.index("-d") + 1])
            assert f"{url.partition('/v1')[0]}/docs" in text
            answer = httpx.post(url, json=body | {"max_tokens": 4}, timeout=REQUEST_S)
            assert answer.status_code == 200
            assert answer.text.rstrip().endswith("data: [DONE]")
        finally:
            end(process)
    assert "worker 0: loaded in" in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "seed": 7, "temperature": 0.9}], ids=len)
def test_a_stream_goes_on_where_it_was_when_its_worker_is_killed(
    server: Server, drawn: dict[str, Any]
) -> None:
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 200, "details": True, **drawn}}
    unbroken = server.client.post("/generate", json=body).json()
    with server.client.stream("POST", "/generate_stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        events = [data(next(lines))]
        os.kill(server.worker_pid(), signal.SIGKILL)
        events += map(data, lines)
    tokens = [event["token"]["id"] for event in events]
    assert tokens == [token["id"] for token in unbroken["details"]["tokens"]]
    assert events[-1]["generated_text"] == unbroken["generated_text"]


def test_a_grpc_stream_goes_on_where_it_was_when_its_worker_is_killed(server: Server) -> None:
    parameters = Parameters(max_tokens=200, temperature=0)
    request = GenerateRequest(text="Count", parameters=parameters)
    with grpc.insecure_channel(server.grpc) as channel:
        stub = InferenceStub(channel)
        unbroken = "".join(part.text for part in stub.Generate(request, timeout=REQUEST_S))
        stream = stub.Generate(request, timeout=REQUEST_S)
        text = next(stream).text
        os.kill(server.worker_pid(), signal.SIGKILL)
        assert text + "".join(part.text for part in stream) == unbroken


def test_of_a_killed_worker_the_log_says_what_has_happened(tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    with serving(tmp_path, *SCRIPTED) as server:
        os.kill(server.worker_pid(), signal.SIGKILL)
        eventually(lambda: "is down" in log.read_text())
    (line,) = [json.loads(one) for one in log.read_text().splitlines() if "is down" in one]
    assert "the connection broke: its process has ended" in line["message"]


def test_a_worker_that_stays_away_ends_the_stream_in_time(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ("--worker-python", str(python), "--resume-timeout", "0.5")
    with serving(tmp_path, *SCRIPTED, *options) as server:
        with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            assert "token" in data(next(lines))
            python.rename(tmp_path / "away")  # so that no other worker can be started
            os.kill(server.worker_pid(), signal.SIGKILL)
            last = data(list(lines)[-1])
        assert last["error_type"] == "generation"
        assert "none came up to go on within 500 ms" in last["error"]
        (tmp_path / "away").rename(python)
        assert answers(server)


def test_a_killed_worker_ends_the_stream_with_an_error_if_that_is_wanted(strict: Server) -> None:
    with strict.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "token" in data(next(lines))
        os.kill(strict.worker_pid(), signal.SIGKILL)
        last = data(list(lines)[-1])
    assert last["error_type"] == "generation"
    assert answers(strict)


def test_a_killed_worker_then_ends_a_grpc_stream_with_unavailable(strict: Server) -> None:
    request = GenerateRequest(text="Count", parameters=Parameters(max_tokens=3000))
    with grpc.insecure_channel(strict.grpc) as channel:
        stream = InferenceStub(channel).Generate(request, timeout=REQUEST_S)
        next(stream)
        os.kill(strict.worker_pid(), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert answers(strict)


def test_a_request_that_had_not_started_survives_the_worker(server: Server) -> None:
    os.kill(server.worker_pid(), signal.SIGKILL)
    assert answers(server)


def test_a_worker_that_hangs_is_replaced_and_its_streams_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED, "--step-deadline", "0.5") as server:
        hung, body = server.worker_pid(), ENDLESS | {"parameters": {"max_new_tokens": 300}}
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            os.kill(hung, signal.SIGSTOP)
            last = data(list(lines)[-1])
        assert last["details"] is None
        assert len(last["generated_text"]) > 300
        assert not alive(hung)
        assert answers(server)
    told = (tmp_path / "stderr").read_text()
    assert "worker 0: it hung, and was killed; starting it again in 0.1 s" in told


def test_it_takes_more_connections_than_files_are_allowed_at_first(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1000:
        pytest.skip(f"the system allows {hard} open files")
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            server = stack.enter_context(serving(tmp_path, *SCRIPTED))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        url = httpx.URL(server.rest)
        for _ in range(300):
            stack.enter_context(socket.create_connection((url.host, url.port or 80)))
        assert answers(server)


def wakings(pid: int) -> int:
    """How often gRPC's own threads have gone to sleep in a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    shown = [(task / "status").read_text() for task in tasks]
    return sum(
        int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        for text in shown
        if "event_engine" in text.partition("\n")[0]
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system shows no threads")
def test_a_step_wakes_none_of_the_threads_that_grpc_adds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_EXPERIMENTS", raising=False)
    asked = {"inputs": "Count", "parameters": {"max_new_tokens": 200}}
    woken = []
    with serving(tmp_path, *SCRIPTED) as server:
        pids = (server.process.pid, server.worker_pid())
        for _ in range(5):
            before = [wakings(pid) for pid in pids]
            assert server.client.post("/generate", json=asked).status_code == 200
            woken.append([wakings(pid) - early for pid, early in zip(pids, before, strict=True)])
    # They were woken five times a step. Some wake by the clock, and more where others compute,
    # which the quietest of some requests shows least.
    assert all(min(of_one) < 200 for of_one in zip(*woken, strict=True)), woken


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_disk_for_its_lines_ends_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        # With buffers, as users have it: what is left in them makes Python end with 120.
        process = start(("--json-output", *SCRIPTED), full, PYTHONUNBUFFERED="")
    try:
        server = Server(process, json.loads(read_lines(process, lambda line: "rest" in line)[-1]))
        with server.client:
            os.kill(server.worker_pid(), signal.SIGKILL)
            assert answers(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        end(process)


def test_it_may_be_started_without_standard_streams() -> None:
    port, shell = str(free_port()), 'exec "$@" <&- >&- 2>&-'
    command = ("-m", "deploy.cli", "serve", "--hostname", "127.0.0.1", "--port", port)
    words = (sys.executable, *command, "--grpc-port", "0", *SCRIPTED)
    process = subprocess.Popen(["/bin/sh", "-c", shell, "sh", *words], cwd=Path.cwd(), text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: is_up(url) or process.poll() is not None)
        assert httpx.post(f"{url}/generate", json=SHORT, timeout=REQUEST_S).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    finally:
        end(process)


def test_sigterm_lets_a_running_answer_end_and_exits_with_0(tmp_path: Path) -> None:
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 100}}
    with serving(tmp_path, *SCRIPTED) as server:
        worker = server.worker_pid()
        with server.client.stream("POST", "/generate_stream", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.signal(signal.SIGTERM)
            last = data(list(lines)[-1])
        assert last["generated_text"]
        assert server.wait() == 0
        assert not alive(worker)


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED) as server:
        with server.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.signal(signal.SIGTERM)
            eventually(lambda: "shutting down" in (tmp_path / "stderr").read_text())
            server.signal(signal.SIGTERM)
            last = data(list(lines)[-1])
        assert "error" in last
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_loading_ends_the_worker_too(tmp_path: Path, number: signal.Signals) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    with (tmp_path / "stderr").open("w") as errors:
        process = start((*SCRIPTED, "--worker-python", str(slow)), errors, TMPDIR=str(tmp_path))
        try:
            eventually(lambda: bool(children(process.pid)))
            (worker,) = children(process.pid)
            process.send_signal(number)
            ended = signal.SIGTERM if number == signal.SIGHUP else number
            assert process.wait(STOP_S) == 128 + ended
            assert not alive(worker)
        finally:
            end(process)
    assert not list(tmp_path.glob("roundhouse-*"))
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_the_worker_ends_with_a_killed_parent(tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED) as server:
        worker = server.worker_pid()
        server.signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: not alive(worker))


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_taken_port_is_one_line_that_names_it(option: str, tmp_path: Path) -> None:
    with socket.socket() as taken, (tmp_path / "stderr").open("w+") as errors:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start((*SCRIPTED, option, str(port)), errors)
        try:
            assert process.wait(STOP_S) == 1
        finally:
            end(process)
    said = (tmp_path / "stderr").read_text().splitlines()
    told = [line for line in said if line.startswith("roundhouse: error: ")]
    assert len(told) == 1
    assert said[-1] == told[0]
    assert str(port) in told[0]
    assert "Traceback" not in "\n".join(said)


def test_a_group_that_can_never_serve_ends_it_with_that_line(tmp_path: Path) -> None:
    """Its worker has loaded; what it says of itself is of no use to the router."""
    template = tmp_path / "template.jinja"
    template.write_bytes(b"\xff{{ messages }}")
    with (tmp_path / "stderr").open("w") as errors:
        process = start((*SCRIPTED, "--chat-template", str(template)), errors)
        try:
            assert process.wait(STOP_S) == 1
        finally:
            end(process)
    (*_, last) = (tmp_path / "stderr").read_text().splitlines()
    assert re.match(r"roundhouse: error: group scripted cannot serve: .* is not UTF-8", last)


def test_router_and_worker_run_apart(tmp_path: Path) -> None:
    """Two commands that share nothing but an address."""
    address = f"unix://{tmp_path}/apart.sock"
    command = [sys.executable, "-m", "deploy.cli"]
    with (tmp_path / "stderr").open("w") as errors:
        worker = subprocess.Popen(
            [*command, "worker", "--engine", "scripted", "--listen", address],
            stdin=subprocess.DEVNULL,
            stderr=errors,
        )
        router = subprocess.Popen(
            [*command, "router", "--worker", address, "--port", "0", "--grpc-port", "0",
             "--hostname", "127.0.0.1", "--json-output"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )  # fmt: skip
        try:
            ready = json.loads(read_lines(router, lambda line: line.startswith("{"))[-1])
            answer = httpx.post(f"{ready['rest']}/generate", json=SHORT, timeout=REQUEST_S)
            assert answer.status_code == 200
            assert children(router.pid) == []
        finally:
            end(router)
            worker.terminate()
            assert worker.wait(STOP_S) == 0
