"""The driver with a scripted core: what it hears, what it does, and what it refuses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from router.channel import Channel
from router.core.effects import Abandon, Admit, Close, Deliver, Effect, RunPlan
from router.core.events import Ended, Event, GroupDown, Reason, StepDone, Submitted, Ticked
from router.core.snapshot import Snapshot
from router.driver import HEAR_S, STANDSTILL_MS, WAKES_MAX, Driver
from router.errors import Fault, RequestError
from router.metrics import Metrics
from tests.service.fakes import PATIENCE_S, until


class Script:
    """A core that keeps what it observes and answers with what the test has laid ready."""

    def __init__(self) -> None:
        self.seen: list[Event | str] = []
        self.times: list[int] = []
        self.due_ms: int | None = None
        self.ready: list[Effect] = []
        self.plans: list[Effect] = []
        self.fault: Exception | None = None

    def observe(self, now_ms: int, event: Event) -> list[Effect]:
        if self.fault is not None:
            raise self.fault
        self.seen.append(event)
        self.times.append(now_ms)
        ready, self.ready = self.ready, []
        return ready

    def plan(self, now_ms: int) -> list[Effect]:
        self.seen.append("plan")
        if self.due_ms is not None and self.due_ms <= now_ms:
            self.due_ms = None
        plans, self.plans = self.plans, []
        return plans

    def wake_at(self) -> int | None:
        return self.due_ms

    def snapshot(self) -> Snapshot:
        raise NotImplementedError


class Doings:
    """A group that keeps what it is told, and what was readable at that moment."""

    def __init__(self) -> None:
        self.told: list[RunPlan | Abandon] = []
        self.watched: Channel | None = None
        self.tokens_seen: list[int] = []

    def write(self, plan: RunPlan) -> None:
        self.told.append(plan)
        if self.watched is not None:
            self.tokens_seen.append(len(self.watched._tokens))

    def abandon(self, effect: Abandon) -> None:
        self.told.append(effect)


def submitted(request: int, max_tokens: int = 100) -> Submitted:
    return Submitted(request, "m", (1, 2, 3), max_tokens)


def run_plan(*requests: int) -> RunPlan:
    admits = tuple(Admit(request, (1,), 1, 0, 0, None) for request in requests)
    return RunPlan("g", 1, 1, (), admits, requests, (1,) * len(requests))


NEWS = GroupDown("g", 1)
"""An event that stands for any."""


class Stage:
    """A running driver, its core and its group."""

    def __init__(self, requests_max: int, clock: Callable[[], int] | None) -> None:
        self.core = Script()
        self.metrics = Metrics()
        more: dict[str, Any] = {} if clock is None else {"clock": clock}
        self.driver = Driver(self.core, self.metrics, requests_max, **more)
        self.group = Doings()
        self.driver.attach("g", self.group)
        self.task = asyncio.create_task(self.driver.run())

    async def perform(self, *effects: Effect) -> None:
        """Lets the core ask for these."""
        self.core.ready = list(effects)
        seen = len(self.core.seen)
        self.driver.post(NEWS)
        await until(lambda: "plan" in self.core.seen[seen:])

    async def deliver(self, *pairs: tuple[int, int]) -> None:
        await self.perform(Deliver([one for one, _ in pairs], [two for _, two in pairs], []))


@asynccontextmanager
async def staged(
    requests_max: int = 10, clock: Callable[[], int] | None = None
) -> AsyncIterator[Stage]:
    stage = Stage(requests_max, clock)
    yield stage
    stage.driver.stop()
    await asyncio.wait_for(stage.task, PATIENCE_S)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with staged() as stage:
        yield stage


async def test_a_burst_is_observed_whole_and_planned_once(stage: Stage) -> None:
    for request in (1, 2, 3):
        stage.driver.submit(submitted(request))
    stage.driver.end(2, Reason.CANCELLED)
    await until(lambda: "plan" in stage.core.seen)
    assert stage.core.seen == [
        submitted(1),
        submitted(2),
        submitted(3),
        Ended(2, Reason.CANCELLED),
        "plan",
    ]


async def test_a_life_knows_how_much_of_its_prompt_was_there_already(stage: Stage) -> None:
    life = stage.driver.submit(submitted(1)).life
    for prompt_len, share_len, cached in ((5, 3, 3), (5, 0, 3), (5, 9, 5)):
        admit = Admit(1, (1,) * 10, prompt_len, 7 if share_len else 0, share_len, None)
        await stage.perform(RunPlan("g", 1, 1, (), (admit,), (), ()))
        assert life.cached_tokens == cached


async def test_what_has_arrived_comes_as_one_batch(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    await stage.deliver((1, 10))
    await stage.deliver((1, 11))
    batch = await channel.get()
    assert (batch.tokens, batch.logprobs, batch.close) == ([10, 11], [], None)
    await stage.perform(Deliver([1], [12], []), Close(1, Reason.EOS))
    batch = await channel.get()
    assert (batch.tokens, batch.close) == ([12], Close(1, Reason.EOS))
    assert stage.driver.open_requests == 0


async def test_a_reader_that_waits_is_woken(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    reader = asyncio.create_task(channel.get())
    await until(lambda: channel._waiter is not None)
    await stage.deliver((1, 10), (1, 11))
    assert (await reader).tokens == [10, 11]
    reader = asyncio.create_task(channel.get())
    await until(lambda: channel._waiter is not None)
    await stage.perform(Close(1, Reason.LENGTH))
    assert (await reader).close == Close(1, Reason.LENGTH)


async def test_a_reader_may_give_up_and_come_back(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    reader = asyncio.create_task(channel.get())
    await until(lambda: channel._waiter is not None)
    reader.cancel()
    await asyncio.wait([reader])
    await stage.deliver((1, 10))
    assert (await channel.get()).tokens == [10]


async def test_logprobs_stay_with_their_tokens(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    other = stage.driver.submit(submitted(2))
    await stage.deliver((1, 10), (2, 20))
    await stage.perform(Deliver([1, 2], [11, 21], ["L11", None]))
    await stage.deliver((1, 12))
    batch = await channel.get()
    assert (batch.tokens, batch.logprobs) == ([10, 11, 12], [None, "L11", None])
    assert (await other.get()).logprobs == []


async def test_a_slow_reader_stalls_nobody(stage: Stage) -> None:
    slow, quick = stage.driver.submit(submitted(1)), stage.driver.submit(submitted(2))
    read: list[int] = []
    for token in range(100):
        await stage.deliver((1, token), (2, token))
        read += (await quick.get()).tokens
    assert read == list(range(100))
    assert (await slow.get()).tokens == list(range(100))


async def test_plans_go_out_before_tokens_are_delivered(stage: Stage) -> None:
    stage.group.watched = stage.driver.submit(submitted(1))
    stage.core.plans = [run_plan(1)]
    await stage.deliver((1, 10))
    assert stage.group.told == [run_plan(1)]
    assert stage.group.tokens_seen == [0]
    assert (await stage.group.watched.get()).tokens == [10]


async def test_a_group_is_told_to_give_up(stage: Stage) -> None:
    await stage.perform(Abandon("g", 1, "no answer"))
    assert stage.group.told == [Abandon("g", 1, "no answer")]


async def test_too_many_requests_are_refused_with_a_hint() -> None:
    async with staged(requests_max=2) as stage:
        driver = stage.driver
        driver.submit(submitted(1))
        driver.submit(submitted(2))
        with pytest.raises(RequestError, match="2 requests are open") as refusal:
            driver.submit(submitted(3))
        assert refusal.value.fault is Fault.OVERLOADED
        assert refusal.value.wire.retry_after_s == 1
        driver.end(1, Reason.CANCELLED)  # never refused, nor is anything else
        driver.post(StepDone("g", 1, 1, [], []))
        # The place is free once the core has heard who left it.
        with pytest.raises(RequestError):
            driver.submit(submitted(3))
        await until(lambda: "plan" in stage.core.seen)
        driver.submit(submitted(3))
        await until(lambda: submitted(3) in stage.core.seen)


async def test_what_comes_for_an_ended_request_is_dropped(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    stage.driver.end(1, Reason.STOP_STRING)
    stage.driver.end(1, Reason.CANCELLED)  # harmless
    await stage.perform(Deliver([1], [10], []), Close(1, Reason.STOP_STRING))
    assert stage.driver.open_requests == 0
    assert channel._tokens == []
    assert b"tgi_request_count 1.0" in stage.metrics.render()
    assert b"tgi_request_success 1.0" in stage.metrics.render()


async def test_the_timer_of_the_core_is_kept() -> None:
    now_ms = [1000]
    async with staged(clock=lambda: now_ms[0]) as stage:
        stage.core.due_ms = 1005
        await stage.perform()
        assert Ticked() not in stage.core.seen
        now_ms[0] = 1005
        await until(lambda: Ticked() in stage.core.seen)
        assert stage.core.times[-1] == 1005
        assert stage.core.seen[-1] == "plan"


async def test_after_a_standstill_answers_are_heard_before_anybody_is_late() -> None:
    now_ms = [1000]
    async with staged(clock=lambda: now_ms[0]) as stage:
        stage.core.due_ms = 1001 + STANDSTILL_MS
        await stage.perform()
        stage.core.seen.clear()
        now_ms[0] = stage.core.due_ms + STANDSTILL_MS + 1
        stage.driver.post(Ended(1, Reason.CANCELLED))  # wakes it, as reading from a stream would
        asyncio.get_running_loop().call_later(HEAR_S / 5, stage.driver.post, NEWS)
        await until(lambda: "plan" in stage.core.seen)
        assert stage.core.seen == [Ended(1, Reason.CANCELLED), NEWS, Ticked(), "plan"]


async def test_a_failure_of_the_core_ends_the_driver_and_every_stream() -> None:
    driver = Driver(core := Script(), Metrics(), 10)
    channel = driver.submit(submitted(1))
    core.fault = AssertionError("a bug")
    with pytest.raises(AssertionError, match="a bug"):
        await asyncio.wait_for(driver.run(), PATIENCE_S)
    close = (await channel.get()).close
    assert close is not None
    assert close.reason is Reason.SHUTDOWN
    with pytest.raises(RequestError) as refusal:
        driver.submit(submitted(2))
    assert refusal.value.fault is Fault.UNAVAILABLE


async def test_a_cancelled_driver_leaves_no_reader_waiting() -> None:
    driver = Driver(Script(), Metrics(), 10)
    task = asyncio.create_task(driver.run())
    channel = driver.submit(submitted(1))
    await asyncio.sleep(0)
    task.cancel()
    assert (await asyncio.wait_for(channel.get(), PATIENCE_S)).close is not None
    await asyncio.wait([task])


async def test_more_tokens_than_asked_for_is_a_bug() -> None:
    driver = Driver(core := Script(), Metrics(), 10)
    driver.submit(submitted(1, max_tokens=1))
    core.ready = [Deliver([1, 1], [10, 11], [])]
    with pytest.raises(AssertionError, match="more tokens"):
        await asyncio.wait_for(driver.run(), PATIENCE_S)


async def test_draining_waits_for_the_open_requests(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    draining = asyncio.create_task(stage.driver.drain(PATIENCE_S))
    await until(lambda: not stage.driver.accepting)
    with pytest.raises(RequestError) as refusal:
        stage.driver.submit(submitted(2))
    assert refusal.value.fault is Fault.UNAVAILABLE
    assert not draining.done()
    await stage.perform(Deliver([1], [10], []), Close(1, Reason.EOS))
    await asyncio.wait_for(draining, PATIENCE_S)
    batch = await channel.get()
    assert (batch.tokens, batch.close) == ([10], Close(1, Reason.EOS))


async def test_draining_ends_with_the_request_of_a_client_that_leaves(stage: Stage) -> None:
    stage.driver.submit(submitted(1))
    draining = asyncio.create_task(stage.driver.drain(PATIENCE_S))
    await until(lambda: not stage.driver.accepting)
    stage.driver.end(1, Reason.CANCELLED)
    await asyncio.wait_for(draining, PATIENCE_S)


async def test_what_outlasts_the_drain_is_closed(stage: Stage) -> None:
    channel = stage.driver.submit(submitted(1))
    await stage.driver.drain(0.01)
    close = (await channel.get()).close
    assert close is not None
    assert close.reason is Reason.SHUTDOWN
    await until(lambda: Ended(1, Reason.SHUTDOWN) in stage.core.seen)
    await stage.driver.drain(PATIENCE_S)  # nothing is open: returns at once


async def test_request_ids_are_never_used_twice(stage: Stage) -> None:
    ids = [stage.driver.next_request_id() for _ in range(5)]
    assert len(set(ids)) == 5
    assert 0 not in ids


async def test_a_request_is_measured_from_end_to_end() -> None:
    now_ms = [1000]
    async with staged(clock=lambda: now_ms[0]) as stage:
        channel = stage.driver.submit(submitted(1))
        now_ms[0] = 1020
        await stage.perform(run_plan(1))
        now_ms[0] = 1050
        await stage.deliver((1, 10))
        now_ms[0] = 1070
        await stage.deliver((1, 11))
        now_ms[0] = 1100
        await stage.perform(Close(1, Reason.LENGTH))
        await channel.get()
        shown = stage.metrics.render().decode().splitlines()
    for line in (
        "tgi_request_count 1.0",
        "tgi_request_success 1.0",
        "tgi_request_duration_sum 0.1",
        "tgi_request_queue_duration_sum 0.02",
        "tgi_request_inference_duration_sum 0.08",
        "tgi_request_mean_time_per_token_duration_sum 0.04",
        "tgi_request_generated_tokens_sum 2.0",
        "tgi_request_input_length_sum 3.0",
        "tgi_request_max_new_tokens_sum 100.0",
        "roundhouse_time_to_first_token_seconds_sum 0.05",
        "roundhouse_inter_token_latency_seconds_sum 0.02",
        "roundhouse_inter_token_latency_seconds_count 1.0",
    ):
        assert line in shown


async def test_many_readers_are_woken_in_passes_and_outcomes_are_heard_in_between() -> None:
    """Those in line when the next token comes get both at once; nobody is woken twice for one."""
    count = 8 * WAKES_MAX
    async with staged(requests_max=count) as stage:
        channels = [stage.driver.submit(submitted(n)) for n in range(count)]
        reads = [asyncio.create_task(channel.get()) for channel in channels]
        await until(lambda: "plan" in stage.core.seen)
        await asyncio.sleep(0)
        stage.core.ready = [Deliver(list(range(count)), [1] * count, [])]
        stage.driver.post(NEWS)
        await reads[0]
        assert not reads[-1].done()
        stage.core.ready = [Deliver(list(range(count)), [2] * count, [])]
        stage.driver.post(NEWS)
        batches = await asyncio.wait_for(asyncio.gather(*reads), PATIENCE_S)
        assert batches[0].tokens == [1]
        assert batches[-1].tokens == [1, 2]
        later = await asyncio.wait_for(channels[0].get(), PATIENCE_S)
        assert later.tokens == [2]


async def test_all_of_many_readers_hear_the_end() -> None:
    count = 2 * WAKES_MAX + 1
    async with staged(requests_max=count) as stage:
        channels = [stage.driver.submit(submitted(n)) for n in range(count)]
        reads = [asyncio.create_task(channel.get()) for channel in channels]
        await asyncio.sleep(0)
        stage.driver.stop()
        batches = await asyncio.wait_for(asyncio.gather(*reads), PATIENCE_S)
        assert all(batch.close is not None for batch in batches)
