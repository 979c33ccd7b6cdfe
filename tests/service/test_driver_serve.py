"""The whole router process, by its front doors: ports, signals, and the way out."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2

from router.app import serve
from router.config import GroupSpec, Settings
from router.faces import unless
from tests.service.fakes import PATIENCE_S, Bench, bench_in, until

HOST = "127.0.0.1"


class Served:
    """A router that serves in a task of this loop."""

    def __init__(self, task: asyncio.Task[None], ports: tuple[int, int], bench: Bench) -> None:
        self.task = task
        self.port, self.grpc_port = ports
        self.bench = bench
        self.url = f"http://{HOST}:{self.port}"

    async def ended(self) -> None:
        """Waits for the router to end, as it should."""
        await asyncio.wait_for(self.task, PATIENCE_S)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


@asynccontextmanager
async def served(bench: Bench, worker: dict[str, str], **settings: Any) -> AsyncIterator[Served]:
    address = await bench.start("a", **worker)
    ready: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    on_ready: Callable[[int, int], None] = lambda *ports: ready.set_result(ports)  # noqa: E731
    chosen = Settings(host=HOST, port=0, grpc_port=0, **settings)
    task = asyncio.create_task(serve(chosen, [GroupSpec("g", None, (address,))], on_ready))
    try:
        await asyncio.wait((ready, task), timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        yield Served(task, await ready, bench)
    finally:
        task.cancel()
        await asyncio.wait([task])


def kill(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def stream(served: Served, tokens: int, got: asyncio.Event) -> str:
    """Streams an answer; returns all of it once the server has ended it."""
    body = {"inputs": "the", "parameters": {"max_new_tokens": tokens}}
    text = ""
    async with (
        httpx.AsyncClient(timeout=PATIENCE_S) as client,
        client.stream("POST", f"{served.url}/generate_stream", json=body) as answer,
    ):
        async for piece in answer.aiter_text():
            text += piece
            got.set()
    return text


async def test_both_doors_are_open_when_it_says_so(bench: Bench) -> None:
    async with served(bench, {"answer": "water"}) as router:
        async with httpx.AsyncClient() as client:
            body = {"inputs": "the", "parameters": {"max_new_tokens": 20}}
            answer = await client.post(f"{router.url}/generate", json=body)
            assert answer.status_code == 200
            assert answer.json()["generated_text"] == "water"
            scrape = (await client.get(f"{router.url}/metrics")).text
            assert "tgi_request_success 1.0" in scrape
        async with grpc.aio.insecure_channel(f"{HOST}:{router.grpc_port}") as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            health = await check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        kill(signal.SIGTERM)
        await router.ended()


@pytest.mark.parametrize("open_when_ready", [False, True])
async def test_where_its_ports_are_closed_until_a_worker_is_up(
    bench: Bench, open_when_ready: bool
) -> None:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    ready = asyncio.Event()
    settings = Settings(host=HOST, port=port, grpc_port=0)
    groups = [GroupSpec("g", None, (bench.address("a"),))]
    work = serve(settings, groups, lambda *_: ready.set(), open_when_ready=open_when_ready)
    task = asyncio.create_task(work)
    url = f"http://{HOST}:{port}"
    try:
        async with httpx.AsyncClient(base_url=url) as client:
            if open_when_ready:
                for _ in range(20):  # it tries to reach its worker meanwhile
                    assert refused(port)
                    await asyncio.sleep(0.01)
            else:
                await until(lambda: not refused(port))
                assert (await client.post("/generate", json={"inputs": "x"})).status_code == 503
            await bench.start("a", answer="water")
            await asyncio.wait_for(ready.wait(), PATIENCE_S)
            assert (await client.get("/health")).status_code == 200
            kill(signal.SIGTERM)
            await asyncio.wait_for(task, PATIENCE_S)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_signal_ends_it_before_any_worker_is_up(bench: Bench) -> None:
    settings = Settings(host=HOST, port=0, grpc_port=0)
    groups = [GroupSpec("g", None, (bench.address("a"),))]
    task = asyncio.create_task(serve(settings, groups, print, open_when_ready=True))
    await until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
    kill(signal.SIGTERM)
    await asyncio.wait_for(task, PATIENCE_S)


async def test_the_first_signal_lets_answers_end_and_takes_no_more(bench: Bench) -> None:
    async with served(bench, {}) as router:
        bench.gates["a"].clear()
        answer = asyncio.create_task(stream(router, 40, asyncio.Event()))
        await until(lambda: bench.engines["a"].begun)
        kill(signal.SIGINT)
        await until(lambda: refused(router.port))
        assert not router.task.done()
        bench.gates["a"].set()
        text = await answer
        assert text.count("data:") == 40
        assert '"generated_text":null' not in text.rsplit("data:", 1)[1]
        await router.ended()


async def test_a_closed_terminal_is_a_signal_too_however_often_it_is_told(bench: Bench) -> None:
    async with served(bench, {}) as router:
        bench.gates["a"].clear()
        answer = asyncio.create_task(stream(router, 40, asyncio.Event()))
        await until(lambda: bench.engines["a"].begun)
        kill(signal.SIGHUP)
        await until(lambda: refused(router.port))
        kill(signal.SIGHUP)
        bench.gates["a"].set()
        assert '"generated_text":null' not in (await answer).rsplit("data:", 1)[1]
        await router.ended()


async def test_where_nohup_has_it_ignored_it_goes_on(bench: Bench) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with served(bench, {}) as router:
            kill(signal.SIGHUP)
            assert await stream(router, 4, asyncio.Event())
            assert not refused(router.port)
            kill(signal.SIGTERM)
            await router.ended()
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_the_limit_of_the_drain_closes_what_is_left(bench: Bench) -> None:
    async with served(bench, {"step_ms": "1"}, graceful_termination_timeout_s=0.05) as router:
        got = asyncio.Event()
        answer = asyncio.create_task(stream(router, 6000, got))
        await got.wait()
        kill(signal.SIGTERM)
        await router.ended()
        assert "shut" in await answer


async def test_a_second_signal_does_not_wait(bench: Bench) -> None:
    async with served(bench, {"step_ms": "1"}) as router:
        got = asyncio.Event()
        answer = asyncio.create_task(stream(router, 6000, got))
        await got.wait()
        kill(signal.SIGTERM)
        await until(lambda: refused(router.port))
        kill(signal.SIGTERM)
        await router.ended()
        assert "shut" in await answer


async def test_a_port_that_is_taken_is_named(bench: Bench) -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(host=HOST, port=port, grpc_port=0)
        group = GroupSpec("g", None, (bench.address("none"),))
        with pytest.raises(OSError, match=f"cannot listen on {HOST}:{port}"):
            await serve(settings, [group], lambda *_: None)


async def test_it_can_be_told_to_end_before_any_worker_has_come_up(bench: Bench) -> None:
    group = GroupSpec("g", None, (bench.address("none"),))
    said: list[int] = []
    settings = Settings(host=HOST, port=0, grpc_port=0)
    task = asyncio.create_task(serve(settings, [group], lambda *ports: said.extend(ports)))
    await until(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
    kill(signal.SIGTERM)
    await asyncio.wait_for(task, PATIENCE_S)
    assert said == []


async def test_work_is_given_up_for_an_event() -> None:
    event, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        raise ValueError("a fault")

    event.set()
    assert await unless(event, work()) is False
    assert ended.is_set()
    assert await unless(asyncio.Event(), asyncio.sleep(0)) is True
    with pytest.raises(ValueError, match="a fault"):
        await unless(asyncio.Event(), fail())


def refused(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return False
    except ConnectionRefusedError:
        return True
