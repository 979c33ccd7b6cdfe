"""The whole router but its network faces, over real workers with the scripted engine."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from router import link
from router.app import Router, core_config
from router.ask import Ask, Params
from router.channel import Channel
from router.config import ConfigError, GroupSpec, Settings
from router.core.effects import Close
from router.core.events import Reason, Submitted
from router.core.state import CoreConfig
from router.errors import Fault, RequestError
from shards.v1 import shard_pb2
from tests.service.fakes import PATIENCE_S, Bench, bench_in, until

PROMPT = tuple(range(5, 25))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


@asynccontextmanager
async def routing(*groups: tuple[str, ...], **settings: Any) -> AsyncIterator[Router]:
    specs = [GroupSpec(f"g{number}", None, ranks) for number, ranks in enumerate(groups)]
    async with asyncio.timeout(PATIENCE_S), Router(Settings(**settings), specs) as router:
        await router.fleet.wait_ready()
        yield router


def submit(router: Router, max_tokens: int = 8, prompt: tuple[int, ...] = PROMPT) -> Channel:
    request = router.driver.next_request_id()
    sampling = shard_pb2.Sampling()
    return router.driver.submit(Submitted(request, "m", prompt, max_tokens, sampling=sampling))


async def answer(channel: Channel) -> tuple[list[int], Close]:
    tokens: list[int] = []
    while True:
        batch = await channel.get()
        tokens += batch.tokens
        if batch.close is not None:
            return tokens, batch.close


def follow(bench: Bench, name: str, count: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What the scripted engine says after the prompt."""
    known = list(prompt)
    for _ in range(count):
        known.append(bench.engines[name]._script.follow(known))
    return known[len(prompt) :]


async def test_answers_come_whole_and_in_order(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        prompts = [PROMPT[: 3 + number] for number in range(12)]
        channels = [submit(router, 10 + number, prompts[number]) for number in range(12)]
        answers = await asyncio.gather(*map(answer, channels))
        for number, (tokens, close) in enumerate(answers):
            assert tokens == follow(bench, "a", 10 + number, prompts[number])
            assert close.reason is Reason.LENGTH
        assert router.driver.open_requests == 0
        text = router.metrics.render().decode()
        assert "tgi_request_success 12.0" in text
        assert "tgi_batch_current_size 0.0" in text


async def test_two_ranks_answer_as_one(bench: Bench) -> None:
    ranks = [await bench.start(str(rank), rank=rank, world=2) for rank in range(2)]
    async with routing(tuple(ranks)) as router:
        tokens, _ = await answer(submit(router))
        assert tokens == follow(bench, "0", 8)
        assert bench.engines["1"].begun == bench.engines["0"].begun > 0


async def test_a_killed_worker_ends_its_answers_and_serves_again_when_it_returns(
    bench: Bench,
) -> None:
    address = await bench.start("a", step_ms="1")
    async with routing((address,), resume_streams=False) as router:
        channel = submit(router, 500)
        assert (await channel.get()).tokens
        await bench.kill("a")
        _, close = await answer(channel)
        assert close.reason is Reason.WORKER_LOST
        later = submit(router)  # waits for the worker's return
        await bench.start("a")
        tokens, close = await answer(later)
        assert (tokens, close.reason) == (follow(bench, "a", 8), Reason.LENGTH)


async def test_an_answer_goes_on_when_its_worker_comes_back(bench: Bench) -> None:
    address = await bench.start("a", step_ms="1")
    async with routing((address,)) as router:
        channel = submit(router, 200)
        first = (await channel.get()).tokens
        assert first
        await bench.kill("a")
        await bench.start("a")
        rest, close = await answer(channel)
        assert close.reason is Reason.LENGTH
        assert [*first, *rest] == follow(bench, "a", 200)
        assert router.driver._core.snapshot().resumed == 1


async def test_an_answer_whose_worker_stays_away_ends_in_time(bench: Bench) -> None:
    address = await bench.start("a", step_ms="1")
    async with routing((address,), resume_timeout_s=0.2) as router:
        channel = submit(router, 500)
        assert (await channel.get()).tokens
        lost = monotonic()
        await bench.kill("a")  # the router may have noticed before this returns
        _, close = await answer(channel)
        assert close.reason is Reason.WORKER_LOST
        assert close.detail == "the worker was lost, and none came up to go on within 200 ms"
        assert monotonic() - lost >= 0.2
        later = submit(router)  # one that has not begun waits on
        await bench.start("a")
        tokens, close = await answer(later)
        assert (tokens, close.reason) == (follow(bench, "a", 8), Reason.LENGTH)


async def test_a_wedged_worker_is_given_up_and_used_again_once_it_moves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "OPEN_DEADLINE_S", 0.2)
    async with routing((await bench.start("a"),), step_deadline_s=1.0) as router:
        bench.gates["a"].clear()
        channel = submit(router)
        await until(lambda: not router.fleet.groups_up()["g0"])
        bench.gates["a"].set()
        tokens, close = await answer(channel)  # it had shown nothing yet, so it starts anew
        assert (tokens, close.reason) == (follow(bench, "a", 8), Reason.LENGTH)


async def test_a_reader_that_never_reads_stalls_nobody(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        slow = submit(router, 200)
        for _ in range(3):
            tokens, _ = await answer(submit(router, 40))
            assert len(tokens) == 40
        await until(lambda: router.driver.open_requests == 0)
        tokens, close = await answer(slow)
        assert (tokens, close.reason) == (follow(bench, "a", 200), Reason.LENGTH)


async def test_a_cancelled_request_leaves_the_worker(bench: Bench) -> None:
    async with routing((await bench.start("a", step_ms="1"),)) as router:
        channel = submit(router, 5000)
        await channel.get()
        running = bench.engines["a"]._residents.by_sequence
        assert running
        router.driver.end(1, Reason.CANCELLED)
        assert router.driver.open_requests == 0
        await until(lambda: b"tgi_batch_current_size 0.0" in router.metrics.render())
        tokens, _ = await answer(submit(router))
        assert len(tokens) == 8


async def test_one_request_too_many_is_refused(bench: Bench) -> None:
    async with routing((await bench.start("a"),), max_concurrent_requests=3) as router:
        bench.gates["a"].clear()
        channels = [submit(router) for _ in range(3)]
        with pytest.raises(RequestError) as refusal:
            submit(router)
        assert refusal.value.fault is Fault.OVERLOADED
        bench.gates["a"].set()
        for channel in channels:
            await answer(channel)
        await answer(submit(router))


async def test_two_replicas_share_the_work(bench: Bench) -> None:
    first, second = await bench.start("a"), await bench.start("b")
    async with routing((first,), (second,), max_batch_size=1) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        for gate in bench.gates.values():
            gate.clear()
        channels = [submit(router), submit(router)]
        await until(lambda: bench.engines["a"].begun and bench.engines["b"].begun)
        for gate in bench.gates.values():
            gate.set()
        answers = await asyncio.gather(*map(answer, channels))
        assert answers[0][0] == answers[1][0] == follow(bench, "a", 8)


async def test_what_runs_may_end_in_a_drain_and_the_rest_is_told(bench: Bench) -> None:
    async with routing((await bench.start("a"),), max_batch_size=1) as router:
        gate: threading.Event = bench.gates["a"]
        gate.clear()
        channel = submit(router)
        draining = asyncio.create_task(router.driver.drain(PATIENCE_S))
        await until(lambda: not router.driver.accepting)
        gate.set()
        await draining
        tokens, close = await answer(channel)
        assert (len(tokens), close.reason) == (8, Reason.LENGTH)
        with pytest.raises(RequestError) as refusal:
            submit(router)
        assert refusal.value.fault is Fault.UNAVAILABLE


async def test_leaving_the_router_closes_what_is_open(bench: Bench) -> None:
    async with routing((await bench.start("a", step_ms="1"),)) as router:
        channel = submit(router, 5000)
        await channel.get()
    _, close = await answer(channel)
    assert close.reason is Reason.SHUTDOWN


async def test_a_fault_of_the_core_ends_the_router(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        async with routing((await bench.start("a"),)) as router:
            monkeypatch.setattr(router.driver._core, "plan", lambda _: 1 // 0)
            _, close = await answer(submit(router))
            assert close.reason is Reason.SHUTDOWN
            await asyncio.Event().wait()  # the failure cancels this

    with pytest.raises(ZeroDivisionError):
        await scene()


async def test_the_service_runs_on_it(bench: Bench) -> None:
    async with routing((await bench.start("a", answer="water is long"),)) as router:
        ask = Ask("the number", Params(max_tokens=20, temperature=0.0))
        text = ""
        async with await router.service.generate(ask) as generation:
            async for chunk in generation:
                text += chunk.text
        assert text == "water is long"


def test_groups_that_cannot_work_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="at least one worker"):
        Router(Settings(), [])


def test_settings_reach_the_core_in_its_units() -> None:
    config = core_config(
        Settings(
            max_concurrent_requests=5,
            max_batch_prefill_tokens=6,
            max_batch_total_tokens=7,
            max_batch_size=8,
            plans_in_flight_max=3,
            step_deadline_s=0.0015,
            attempts_max=4,
            resume_streams=False,
            resume_timeout_s=0.0005,
        )
    )
    assert (config.requests_max, config.step_tokens_max, config.kv_tokens_max) == (5, 6, 7)
    assert (config.sequences_max, config.plans_in_flight_max) == (8, 3)
    assert (config.step_deadline_ms, config.attempts_max) == (2, 4)
    assert (config.resume_streams, config.resume_timeout_ms) == (False, 1)
    assert core_config(Settings()) == CoreConfig()
