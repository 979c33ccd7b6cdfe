"""Workers that run elsewhere, as changes of groups want them: real ones, on real sockets."""

import asyncio
import threading
from pathlib import Path

import pytest

from router import remote_workers
from router.change import ChangeError, Problem
from router.config import GroupSpec
from router.remote_workers import RemoteWorkers
from tests.service.fakes import bench_in, until


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str, loaded: float) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "give the address of a worker, host:port or unix:///path"),
        (",", "give the address of a worker"),
        ("nowhere", "worker 'nowhere' must be unix:///path or host:port"),
        ("a:1,b", "worker 'b' must be"),
        ("a:1,a:1", "worker a:1 is in group"),
    ],
)
async def test_addresses_that_are_none_are_refused(text: str, told: str) -> None:
    with pytest.raises(ChangeError) as caught:
        await RemoteWorkers(1).check(text, Told())
    assert caught.value.problem is Problem.INVALID
    assert told in str(caught.value)


async def test_ranks_that_answer_are_a_group_with_a_name_of_its_own(tmp_path: Path) -> None:
    async with bench_in(tmp_path) as bench:
        one = await bench.start("one", rank=0, world=2)
        other = await bench.start("other", rank=1, world=2)
        workers, told = RemoteWorkers(2), Told()
        await workers.check(f"{one},{other}", told)
        spec = await workers.start(f"{one},{other}", told)
        assert spec == GroupSpec("group-2", None, (one, other))
        assert told.lines == [f"group-2: waiting for {one}, {other}"]
        assert (await workers.start(one, told)).name == "group-3"
        await workers.end("group-2")
        assert (await workers.start(other, told)).name == "group-4"


async def test_a_worker_that_loads_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.link.DESCRIBE_DEADLINE_S", 0.1)
    async with bench_in(tmp_path) as bench:
        loaded, told = threading.Event(), Told()
        address = await bench.start("one", load_after=loaded)
        starting = asyncio.create_task(RemoteWorkers(0).start(address, told))
        await until(lambda: len(told.lines) >= 3)
        assert told.lines[1] == (
            f"group-0: {address} does not answer yet: it may be loading its model"
        )
        loaded.set()
        assert (await starting).addresses == (address,)


async def test_a_worker_that_is_just_starting_is_waited_for(tmp_path: Path) -> None:
    async with bench_in(tmp_path) as bench:
        starting = asyncio.create_task(RemoteWorkers(0).start(bench.address("one"), Told()))
        done, _ = await asyncio.wait((starting,), timeout=0.3)
        assert not done
        await bench.start("one")
        assert (await starting).name == "group-0"


async def test_a_worker_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_workers, "REACH_S", 0.1)
    async with bench_in(tmp_path) as bench:
        there = await bench.start("one")
        missing = bench.address("none")
        with pytest.raises(ChangeError, match="nobody can be reached there") as caught:
            await RemoteWorkers(0).start(f"{there},{missing}", Told())
        assert caught.value.problem is Problem.IMPOSSIBLE
        assert missing in str(caught.value)
        assert there not in str(caught.value)


async def test_nothing_is_started_again_that_was_never_started() -> None:
    workers = RemoteWorkers(1)
    assert not workers.ends_them
    with pytest.raises(ChangeError, match="run elsewhere"):
        await workers.start_again("group-0", Told())
