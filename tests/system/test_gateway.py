"""``roundhouse gateway`` as processes, before a router with the scripted engine."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
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
    gateway,
    serving,
    start_gateway,
)
from tests.system.test_cli import only_line, roundhouse

SCRIPTED = ("--engine", "scripted", "--engine-option", "step_ms=5")
ENDLESS = {"inputs": "Count", "parameters": {"max_new_tokens": 3000}}
# What that takes at least, at one token a step.
ENDLESS_S = 15.0
SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 8}}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("router"), *SCRIPTED) as server:
        yield server


def data(line: str) -> Any:
    return json.loads(line.removeprefix("data:"))


def answers(server: Server) -> bool:
    return server.client.post("/generate", json=SHORT).status_code == 200


def idle(router: Server) -> bool:
    """Whether nothing runs at the router, waits, or holds tokens."""
    shown = router.client.get("/metrics").text
    names = ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens")
    return all(f"\n{name} 0.0\n" in shown for name in names)


def test_it_answers_as_its_router_does(router: Server, tmp_path: Path) -> None:
    with gateway(tmp_path, router.grpc) as before:
        assert (before.model, before.grpc) == ("", "")
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/generate", SHORT),
            ("/v1/completions", {"prompt": "x", "max_tokens": 9, "temperature": 0}),
        ]
        for path, body in bodies:
            ours, theirs = (one.client.post(path, json=body).json() for one in (before, router))
            for answer in (ours, theirs):
                answer.pop("id", None)
                answer.pop("created", None)
                answer.pop("usage", None)
            assert ours == theirs
        assert before.client.get("/info").json() == router.client.get("/info").json()


def test_a_killed_gateway_frees_the_tokens_of_its_requests(router: Server, tmp_path: Path) -> None:
    with gateway(tmp_path, router.grpc) as before:
        threads = []
        begun = threading.Semaphore(0)

        def ask() -> None:
            try:
                with before.client.stream("POST", "/generate_stream", json=ENDLESS) as answer:
                    for _ in answer.iter_lines():
                        begun.release()
            except httpx.HTTPError:
                return

        for _ in range(4):
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
        assert begun.acquire(timeout=REQUEST_S)
        eventually(lambda: not idle(router))
        before.signal(signal.SIGKILL)
        for thread in threads:
            thread.join(STOP_S)
        # Well before they would end by themselves, or a gateway that stands still be given up.
        eventually(lambda: idle(router), within_s=ENDLESS_S / 2)
        assert answers(router)


def test_a_killed_router_ends_streams_with_an_event_and_its_successor_is_found(
    tmp_path: Path,
) -> None:
    port = free_port()
    fixed = (*SCRIPTED, "--grpc-port", port)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with serving(first, *fixed) as router, gateway(tmp_path, router.grpc) as before:
        workers = children(router.process.pid)
        with before.client.stream("POST", "/generate_stream", json=ENDLESS) as response:
            lines = (line for line in response.iter_lines() if line)
            assert "token" in data(next(lines))
            router.signal(signal.SIGKILL)
            last = data(list(lines)[-1])
        assert last["error_type"] == "generation"
        assert "router" in last["error"]
        eventually(lambda: before.client.get("/health").status_code == 503)
        refused = before.client.post("/generate", json=SHORT)
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        assert refused.headers["retry-after"]
        for pid in workers:
            eventually(lambda pid=pid: not alive(pid))  # type: ignore[misc]
        with serving(second, *fixed):
            eventually(lambda: before.client.get("/health").status_code == 200)
            assert answers(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_a_running_answer_end_and_exits_with_0(
    router: Server, tmp_path: Path, number: signal.Signals
) -> None:
    body = {"inputs": "Count", "parameters": {"max_new_tokens": 100}}
    with gateway(tmp_path, router.grpc) as before:
        with before.client.stream("POST", "/generate_stream", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            before.signal(number)
            last = data(list(lines)[-1])
        assert last["generated_text"]
        assert before.wait() == 0
    eventually(lambda: idle(router))


def test_without_a_router_it_says_why_it_waits_and_can_be_ended(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "gateway"
    with log.open("w") as errors:
        where = ("--router", f"127.0.0.1:{free_port()}", "--port", port)
        process = start_gateway(where, errors)
        try:
            eventually(lambda: "not attached" in log.read_text())
            answer = httpx.get(f"http://127.0.0.1:{port}/health")
            assert answer.status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0
            assert process.stdout is not None
            assert process.stdout.read() == "", "it was never ready"
        finally:
            end(process)


def test_gateways_share_a_port_and_one_that_is_killed_is_not_missed(
    router: Server, tmp_path: Path
) -> None:
    own = free_port()
    with gateway(tmp_path, router.grpc) as first:
        port = first.rest.rpartition(":")[2]
        with gateway(tmp_path, router.grpc, "--port", port, "--own-port", own) as second:
            assert second.rest == first.rest
            before = httpx.get(f"http://127.0.0.1:{own}/metrics").text
            assert "\ntgi_request_count 0.0\n" in before
            assert "\nroundhouse_gateway_attached 1.0\n" in before
            first.signal(signal.SIGKILL)
            first.wait()
            for _ in range(20):
                assert httpx.post(f"{second.rest}/generate", json=SHORT).status_code == 200
            after = httpx.get(f"http://127.0.0.1:{own}/metrics").text
            assert "\ntgi_request_count 20.0\n" in after


def test_what_a_user_can_get_wrong_is_one_line(router: Server, tmp_path: Path) -> None:
    assert "host:port" in only_line(roundhouse("gateway", "--router", "nowhere"))
    assert "--router" in only_line(roundhouse("gateway"))
    with gateway(tmp_path, router.grpc, "--exclusive-port") as before:
        port = before.rest.rpartition(":")[2]
        where = ("--hostname", "127.0.0.1", "--port", port)
        line = only_line(roundhouse("gateway", "--router", router.grpc, *where))
        assert "in use" in line
        assert "--port" in line


def test_a_key_that_the_router_does_not_take_is_one_line(tmp_path: Path) -> None:
    with serving(tmp_path, *SCRIPTED, "--api-key", "inner") as router:
        where = ("--router", router.grpc, "--hostname", "127.0.0.1", "--port", "0")
        assert "--router-api-key" in only_line(roundhouse("gateway", *where))
        with gateway(
            tmp_path, router.grpc, "--router-api-key", "inner", "--api-key", "outer"
        ) as before:
            for key, status in (("outer", 200), ("inner", 401)):
                headers = {"authorization": f"Bearer {key}"}
                answer = before.client.post("/generate", json=SHORT, headers=headers)
                assert answer.status_code == status
