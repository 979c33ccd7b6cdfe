"""Groups that take each other's place under a router that runs, over real workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.app import Router
from router.change import ChangeError, Problem, Tell
from router.changing import Changes
from router.config import GroupSpec
from router.core.events import Reason
from tests.service.change_rig import over
from tests.service.fakes import Bench, bench_in, until
from tests.service.test_driver_workers import answer, follow, routing, submit

LIMIT_S = 15.0


class BenchWorkers:
    """Workers in this process, whose groups have their names; that of "g0" is there already.

    A group called "faulty" cannot start; another waits for the gate.
    """

    ends_them = True

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = {"g0"}

    async def check(self, text: str, tell: Tell) -> None:
        """Any name will do."""

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        tell(f"{text}: loading", 0.5)
        await self.gate.wait()
        if text == "faulty":
            raise ChangeError(Problem.IMPOSSIBLE, "no room")
        address = await self.bench.start(text, step_ms="1")
        self.running.add(text)
        return GroupSpec(text, "m", (address,))

    async def end(self, name: str) -> None:
        if name in self.running:
            self.running.remove(name)
            await self.bench.kill(name)

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        return await self.start(name, tell)


class Rig:
    def __init__(self, router: Router, bench: Bench) -> None:
        self.router = router
        self.bench = bench
        self.workers = BenchWorkers(bench)
        self.changes = Changes(router.groups, self.workers, router.own, LIMIT_S)
        self.lines: list[str] = []

    def tell(self, line: str, loaded: float) -> None:
        self.lines.append(line)

    def up(self) -> list[str]:
        return [one.spec.name for one in self.changes.states() if one.state == "up"]


@asynccontextmanager
async def rig_in(folder: Path) -> AsyncIterator[Rig]:
    async with (
        bench_in(folder) as bench,
        routing((await bench.start("g0", step_ms="1"),), resume_streams=True) as router,
    ):
        rig = Rig(router, bench)
        try:
            yield rig
        finally:
            await rig.changes.close()


@pytest.mark.parametrize("stop_first", [False, True])
async def test_streams_go_on_in_the_new_group(tmp_path: Path, stop_first: bool) -> None:
    async with rig_in(tmp_path) as rig:
        channels = [submit(rig.router, 200, tuple(range(5, 9 + number))) for number in range(6)]
        first = [(await channel.get()).tokens for channel in channels]
        await rig.changes.switch("new", stop_first, 0, rig.tell)
        assert rig.up() == ["new"]
        for number, channel in enumerate(channels):
            rest, close = await answer(channel)
            assert close.reason is Reason.LENGTH
            whole = follow(rig.bench, "new", 200, tuple(range(5, 9 + number)))
            assert [*first[number], *rest] == whole
        assert rig.router.driver._core.snapshot().resumed == 0, "none was lost"
        assert rig.workers.running == {"new"}


async def test_requests_wait_while_there_is_no_group(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        begun = submit(rig.router, 100)
        tokens = (await begun.get()).tokens
        rig.workers.gate.clear()
        switch = asyncio.create_task(rig.changes.switch("new", True, 0, rig.tell))
        await until(lambda: "new: loading" in rig.lines)
        assert rig.up() == []
        assert rig.workers.running == set()
        assert rig.router.fleet.model("m").id == "m", "requests for it are taken"
        late = submit(rig.router, 8)
        await until(lambda: rig.changes.waiting == 2)
        rig.workers.gate.set()
        await switch
        rest, _ = await answer(begun)
        assert [*tokens, *rest] == follow(rig.bench, "new", 100)
        assert (await answer(late))[0] == follow(rig.bench, "new", 8)


async def test_streams_go_on_in_the_former_group_if_the_new_one_cannot_serve(
    tmp_path: Path,
) -> None:
    async with rig_in(tmp_path) as rig:
        channel = submit(rig.router, 200)
        tokens = (await channel.get()).tokens
        with pytest.raises(ChangeError, match="no room; the former groups serve again: g0"):
            await rig.changes.switch("faulty", True, 0, rig.tell)
        assert rig.up() == ["g0"]
        rest, close = await answer(channel)
        assert close.reason is Reason.LENGTH
        assert [*tokens, *rest] == follow(rig.bench, "g0", 200)


async def test_a_group_of_the_same_name_takes_the_place(tmp_path: Path) -> None:
    """The model is known all the time, so that no request is refused meanwhile."""
    async with rig_in(tmp_path) as rig:
        channel, fleet, known = submit(rig.router, 200), rig.router.fleet, list[bool]()
        tokens = (await channel.get()).tokens
        with fleet.watched(lambda: known.append(bool(fleet.models()))):
            await rig.changes.switch("g0", True, 0, rig.tell)
        assert known
        assert all(known)
        assert rig.up() == ["g0"]
        rest, _ = await answer(channel)
        assert [*tokens, *rest] == follow(rig.bench, "g0", 200)


async def test_whoever_leaves_gets_everything_as_it_was(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        rig.workers.gate.clear()
        caller = asyncio.create_task(rig.changes.switch("new", True, 0, rig.tell))
        await until(lambda: "new: loading" in rig.lines)
        caller.cancel()
        await until(lambda: "g0: loading" in rig.lines)
        rig.workers.gate.set()
        await over(rig.changes)
        assert rig.up() == ["g0"]
        assert rig.workers.running == {"g0"}
        assert (await answer(submit(rig.router, 8)))[0] == follow(rig.bench, "g0", 8)


async def test_a_router_that_ends_ends_the_change(tmp_path: Path) -> None:
    async with rig_in(tmp_path) as rig:
        rig.workers.gate.clear()
        caller = asyncio.create_task(rig.changes.add("new", 0, rig.tell))
        await until(lambda: rig.lines)
        await rig.changes.close()
        with pytest.raises(ChangeError, match="the server is shutting down"):
            await caller
