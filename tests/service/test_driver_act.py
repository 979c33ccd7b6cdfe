"""Turns that whoever reads a connection takes at once: none is taken twice, or within another."""

import asyncio

import pytest

from router.core.effects import Close, RunPlan
from router.core.events import Ended, GroupDown, Reason
from router.driver import STANDSTILL_MS
from tests.service.fakes import PATIENCE_S, until
from tests.service.test_driver import NEWS, Doings, Stage, run_plan, staged, submitted


async def passes() -> None:
    """Lets the loop run everything that is ready, and what that makes ready."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_turn_is_taken_before_act_returns_and_not_once_more() -> None:
    async with staged() as stage:
        await passes()
        stage.core.plans = [run_plan(1)]
        stage.driver.act(NEWS)
        assert stage.core.seen == [NEWS, "plan"]
        assert stage.group.told == [run_plan(1)]
        await passes()
        assert stage.core.seen == [NEWS, "plan"]


async def test_what_was_posted_before_goes_first_and_shares_the_turn() -> None:
    async with staged() as stage:
        await passes()
        stage.driver.submit(submitted(1))
        stage.driver.act(NEWS)
        assert stage.core.seen == [submitted(1), NEWS, "plan"]
        await passes()
        assert stage.core.seen == [submitted(1), NEWS, "plan"]
        stage.driver.post(Ended(1, Reason.CANCELLED))
        await until(lambda: stage.core.seen[3:] == [Ended(1, Reason.CANCELLED), "plan"])


class Talker(Doings):
    """A group that has news for the driver while it is told a plan."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.seen: list[int] = []

    def write(self, plan: RunPlan) -> None:
        super().write(plan)
        self.stage.driver.act(GroupDown("talker", len(self.told)))
        self.seen.append(len(self.stage.core.seen))


@pytest.mark.parametrize("at_once", [True, False])
async def test_news_within_a_turn_waits_for_the_next(at_once: bool) -> None:
    async with staged() as stage:
        talker = Talker(stage)
        stage.driver.attach("talker", talker)
        await passes()
        plan = RunPlan("talker", 1, 1, (), (), (), ())
        stage.core.plans = [plan, plan]
        (stage.driver.act if at_once else stage.driver.post)(NEWS)
        later = [GroupDown("talker", 1), GroupDown("talker", 2), "plan"]
        await until(lambda: stage.core.seen == [NEWS, "plan", *later])
        assert talker.seen == [2, 2], "a turn within a turn"


async def test_a_fault_is_the_drivers_and_ends_every_stream() -> None:
    stage = Stage(10, None)
    await passes()
    channel = stage.driver.submit(submitted(1))
    await passes()
    stage.core.fault = RuntimeError("a bug")
    stage.driver.act(NEWS)
    with pytest.raises(RuntimeError, match="a bug"):
        await asyncio.wait_for(stage.task, PATIENCE_S)
    assert (await channel.get()).close == Close(
        1, Reason.SHUTDOWN, "the server has failed and is restarting"
    )
    stage.core.fault = None
    seen = len(stage.core.seen)
    stage.driver.act(NEWS)
    assert len(stage.core.seen) == seen, "a driver that has failed asks its core nothing"


async def test_a_driver_that_does_not_run_acts_on_nothing() -> None:
    stage = Stage(10, None)
    stage.driver.act(NEWS)
    assert not stage.core.seen
    await until(lambda: stage.core.seen == [NEWS, "plan"])
    stage.driver.stop()
    stage.driver.act(NEWS)
    assert stage.core.seen == [NEWS, "plan"]
    await asyncio.wait_for(stage.task, PATIENCE_S)


async def test_after_a_standstill_act_leaves_the_turn_to_the_driver() -> None:
    now_ms = [1000]
    async with staged(clock=lambda: now_ms[0]) as stage:
        stage.core.due_ms = 2000
        stage.driver.act(NEWS)
        await until(lambda: stage.core.seen == [NEWS, "plan"])
        now_ms[0] = 2000 + STANDSTILL_MS + 1
        stage.driver.act(NEWS)
        assert stage.core.seen == [NEWS, "plan"]
        await until(lambda: len(stage.core.seen) == 5)
        assert stage.core.seen[2] == NEWS
