"""What only a group can do that is being restarted: over real workers with the scripted engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.core.events import Reason
from tests.service.fakes import Bench, bench_in, until
from tests.service.test_driver_workers import answer, follow, routing, submit
from tests.service.test_groups import LIMIT_S, state

LONG = 60
SHORT = {"length_max": "40"}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


async def both(bench: Bench) -> tuple[tuple[str], tuple[str]]:
    """A group that can do anything, and one that holds little."""
    return (await bench.start("large"),), (await bench.start("small", **SHORT),)


async def test_a_worker_that_is_killed_and_started_again_refuses_nobody(bench: Bench) -> None:
    async with routing(*await both(bench)) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        await bench.kill("large")
        await until(lambda: state(router, "g0").state == "down")
        waits, short = submit(router, LONG), submit(router)
        tokens, close = await answer(short)
        assert (tokens, close.reason) == (follow(bench, "small", 8), Reason.LENGTH)
        assert router.groups.waiting == 1
        await bench.start("large")
        tokens, close = await answer(waits)
        assert (tokens, close.reason) == (follow(bench, "large", LONG), Reason.LENGTH)


async def test_nor_does_one_that_is_told_to_leave(bench: Bench) -> None:
    async with routing(*await both(bench)) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        bench.gates["large"].clear()
        runs = submit(router, LONG)
        await until(lambda: bench.engines["large"].begun == 1)
        leaving = asyncio.create_task(bench.worker("large").leave())
        await until(lambda: state(router, "g0").state == "leaving")
        waits = submit(router, LONG)
        bench.gates["large"].set()
        assert (await answer(runs))[1].reason is Reason.LENGTH
        await leaving
        await bench.kill("large")
        await bench.start("large")
        assert (await answer(waits))[1].reason is Reason.LENGTH


@pytest.mark.parametrize("first", ["killed", "removed"])
async def test_a_group_that_was_taken_away_is_not_waited_for(bench: Bench, first: str) -> None:
    """Whether it was up, or down already and its requests waited."""
    async with routing(*await both(bench)) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        if first == "killed":
            await bench.kill("large")
            await until(lambda: state(router, "g0").state == "down")
            waits = submit(router, LONG)
            await until(lambda: router.groups.waiting == 1)
        await router.groups.remove("g0", LIMIT_S)
        late = submit(router, LONG)
        assert (await answer(late))[1].reason is Reason.TOO_LONG
        if first == "killed":
            assert (await answer(waits))[1].reason is Reason.TOO_LONG


async def test_one_that_stays_away_is_given_up(bench: Bench) -> None:
    async with routing(*await both(bench), resume_timeout_s=0.05) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        await bench.kill("large")
        await until(lambda: state(router, "g0").state == "down")
        assert (await answer(submit(router, LONG)))[1].reason is Reason.TOO_LONG
