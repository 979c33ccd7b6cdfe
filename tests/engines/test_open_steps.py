"""Steps that are under way on a device while the next one is started, and what may come between.

The engine's device is one that the test lets go on, step by step.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio

from shards.engines.base import STARTED_MAX, EngineLost, EngineOptions, Outcome, Plan, Started
from shards.engines.scripted import ScriptedEngine
from shards.v1 import shard_pb2 as pb
from tests.engines.bench import PATIENCE_S, Client, first_plan, next_plan, serving


class Gate(Started):
    """A step that is done once the test opens its gate."""

    def __init__(self, outcome: Outcome) -> None:
        self.gate = threading.Event()
        self.fault: Exception | None = None
        self._outcome = outcome

    def open(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.gate.set()

    @property
    def done(self) -> bool:
        return self.gate.is_set()

    def wait(self) -> None:
        assert self.gate.wait(PATIENCE_S)
        if self.fault is not None:
            raise self.fault

    def finish(self) -> Outcome:
        self.wait()
        return self._outcome


class Ahead(ScriptedEngine):
    """``started`` are all its steps, ``resets`` counts how often it forgot everything."""

    def __init__(self) -> None:
        super().__init__(EngineOptions(None, "m", 4096, 8, 256), lambda _fraction: None)
        self.started: list[Gate] = []
        self.changed = threading.Condition()
        self.resets = 0

    def start(self, plan: Plan) -> Started:
        step = Gate(self.step(plan))
        with self.changed:
            self.started.append(step)
            self.changed.notify_all()
        return step

    def reset(self) -> None:
        super().reset()
        with self.changed:
            self.resets += 1
            self.changed.notify_all()

    async def has_started(self, count: int) -> None:
        def wait() -> bool:
            with self.changed:
                return self.changed.wait_for(lambda: len(self.started) >= count, PATIENCE_S)

        assert await asyncio.to_thread(wait)


@asynccontextmanager
async def ahead(folder: Path) -> AsyncIterator[tuple[Client, Ahead]]:
    engine = Ahead()
    async with serving(folder, lambda: engine) as client:
        try:
            yield client, engine
        finally:
            for step in engine.started:
                step.open()


async def answers(stream: grpc.aio.StreamStreamCall, count: int) -> list[int]:
    """The numbers of the next plans that are answered."""
    return [(await outcome(stream)).plan_id for _ in range(count)]


async def outcome(stream: grpc.aio.StreamStreamCall) -> pb.Outcome:
    answer = await stream.read()
    assert isinstance(answer, pb.Outcome)
    return answer


async def test_the_next_step_starts_before_the_last_one_is_answered(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.write(next_plan(2, 1))
        await engine.has_started(2)
        engine.started[0].open()
        assert await answers(stream, 1) == [1]
        assert not engine.started[1].done
        engine.started[1].open()
        assert await answers(stream, 1) == [2]


async def test_no_more_are_open_than_an_engine_allows(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        for number in range(2, 6):
            await stream.write(next_plan(number, 1))
        await engine.has_started(STARTED_MAX)
        for number in range(5):
            assert len(engine.started) <= number + STARTED_MAX
            engine.started[number].open()
            assert await answers(stream, 1) == [number + 1]
            await engine.has_started(min(5, number + 1 + STARTED_MAX))


async def test_a_plan_that_is_refused_is_answered_behind_the_open_ones(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await engine.has_started(1)
        await stream.write(next_plan(2, 77))
        engine.started[0].open()
        assert await answers(stream, 1) == [1]
        code, details = await client.fault(stream)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "plan 2" in details


async def test_a_device_that_is_lost_under_way_ends_the_stream(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.write(next_plan(2, 1))
        await engine.has_started(2)
        engine.started[0].open(EngineLost("the device fell off the bus"))
        code, details = await client.fault(stream)
        assert (code, details) == (grpc.StatusCode.INTERNAL, "the device fell off the bus")
        assert await client.worker.lost() == details


async def test_who_takes_over_begins_when_open_steps_are_finished(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        first = client.stub.Run()
        await first.write(first_plan(1))
        await engine.has_started(1)
        resets = engine.resets
        second = client.stub.Run()
        await second.write(first_plan(2, epoch=2))
        code, _ = await client.fault(first)
        assert code is grpc.StatusCode.ABORTED
        assert engine.resets == resets
        engine.started[0].open()
        await engine.has_started(2)
        assert engine.resets == resets + 1
        engine.started[1].open()
        assert await answers(second, 1) == [1]


async def test_a_step_counts_what_it_took_of_the_device(tmp_path: Path) -> None:
    """Of two that overlap the second one begins when the first ends."""
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        began_s = time.monotonic()
        await stream.write(first_plan(1))
        await stream.write(next_plan(2, 1))
        await engine.has_started(2)
        took_us = 0
        for step in engine.started:
            step.open()
            took_us += (await outcome(stream)).step_us
        assert took_us <= (time.monotonic() - began_s) * 1e6


async def test_a_device_that_never_answers_is_told_from_an_idle_engine(tmp_path: Path) -> None:
    async with ahead(tmp_path) as (client, engine):
        stream = client.stub.Run()
        thread = client.worker._engine
        await stream.write(first_plan(1))
        await engine.has_started(1)
        first = thread.busy_s()
        assert first > 0.0
        while thread.busy_s() <= first:
            await asyncio.sleep(0)
        engine.started[0].open()
        await answers(stream, 1)
        while thread.busy_s():
            await asyncio.sleep(0)
