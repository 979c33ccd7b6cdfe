"""Groups that come and go while the supervisor runs."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.keeper import Died, Loading, News, Ready, Said, StartError, WorkerSpec
from deploy.supervisor import Supervisor
from tests.system.server import alive as runs
from tests.system.test_supervisor import (
    DEADLINE_S,
    READY,
    SAY_PID,
    Heard,
    alive,
    is_pid,
    pid_of,
    running,
    spec,
)
from tests.system.test_supervisor_groups import STUCK, gone, is_ready, pids_of

LOADS = "tell('loading', fraction=0.5)\nsys.stdin.read()"
# Says that it was asked to leave, and stays.
STUBBORN = (
    "def asked(*_): print('asked', file=sys.stderr, flush=True)\n"
    "signal.signal(signal.SIGTERM, asked)\ntell('ready')\nwhile True: time.sleep(600)"
)
CHILD = (
    "import subprocess\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('pid', child.pid, file=sys.stderr, flush=True)\n"
)


@asynccontextmanager
async def supervised(
    tmp_path: Path, heard: Heard, pauses_s: tuple[float, ...] = (0.0,), leave_s: float = 5.0
) -> AsyncIterator[Supervisor]:
    """A supervisor whose group "a" is ready; nothing that it ever started is left behind."""
    first = {"a": [spec(tmp_path, SAY_PID + READY, "a 0")]}
    supervisor = Supervisor(first, heard, pauses_s, leave_s)
    async with running(supervisor):
        async with asyncio.timeout(DEADLINE_S):
            await supervisor.all_ready()
        yield supervisor
    await gone([pid_of(news) for news in heard.all if is_pid(news)])


async def within_deadline(work: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await work


def is_loading(news: News) -> bool:
    return isinstance(news, Loading)


def is_asked(news: News) -> bool:
    return isinstance(news, Said) and news.line == "asked"


def started_by(heard: Heard, worker: str) -> list[int]:
    """All processes that a worker has told of: itself and its children."""
    return [pid_of(news) for news in heard.all if is_pid(news) and news.worker == worker]


def deaths(heard: Heard) -> list[str]:
    return [news.worker for news in heard.all if isinstance(news, Died)]


async def test_a_further_group_is_there_when_all_its_ranks_are_ready(tmp_path: Path) -> None:
    heard, own = Heard(), Heard()
    code = SAY_PID + "tell('loading', fraction=0.5)\n" + READY
    ranks = [spec(tmp_path, code, "b 0"), spec(tmp_path, code, "b 1")]
    async with supervised(tmp_path, heard) as supervisor:
        await within_deadline(supervisor.start("b", ranks, own))
        assert {news.worker for news in own.all if isinstance(news, Ready)} == {"b 0", "b 1"}
        assert {news.worker for news in own.all} == {"b 0", "b 1"}
        assert [news for news in heard.all if news.worker != "a 0"] == own.all
        told = len(own.all)
        os.kill(pids_of(heard)["b 1"], signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Ready) and news.again, 2)
        assert deaths(heard) == ["b 1"]
        assert len(own.all) == told  # whoever started it need not hear of what comes later


async def test_a_group_that_cannot_start_leaves_nothing_and_harms_nobody(tmp_path: Path) -> None:
    heard = Heard()
    failing = "tell('error', message='no room on cuda:0')\nsys.exit(1)"
    ranks = [spec(tmp_path, SAY_PID + READY, "b 0"), spec(tmp_path, failing, "b 1")]
    for rank in ranks:
        rank.socket.touch()
    async with supervised(tmp_path, heard) as supervisor:
        with pytest.raises(StartError, match=r"^b 1: no room on cuda:0$"):
            await within_deadline(supervisor.start("b", ranks, Heard()))
        pids = pids_of(heard)
        assert "b 0" not in pids or not runs(pids["b 0"])
        assert not any(rank.socket.exists() for rank in ranks)
        assert deaths(heard) == []
        assert alive(pids["a 0"])
        better = [spec(tmp_path, READY, "b 0")]
        await within_deadline(supervisor.start("b", better, Heard()))


async def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    absent = WorkerSpec("b 0", ("/no/such/python",), tmp_path / "socket")
    async with supervised(tmp_path, Heard()) as supervisor:
        with pytest.raises(StartError, match=r"^b 0: cannot run /no/such/python"):
            await within_deadline(supervisor.start("b", [absent], Heard()))


async def test_a_group_ends_for_good_with_all_that_it_has_started(tmp_path: Path) -> None:
    heard = Heard()
    ranks = [spec(tmp_path, CHILD + SAY_PID + READY, f"b {rank}") for rank in range(2)]
    async with supervised(tmp_path, heard) as supervisor:
        await within_deadline(supervisor.start("b", ranks, Heard()))
        started = [*started_by(heard, "b 0"), *started_by(heard, "b 1")]
        assert len(started) == 4
        await within_deadline(supervisor.end("b"))
        await gone(started)
        assert deaths(heard) == []
        assert alive(pids_of(heard)["a 0"])
        await within_deadline(supervisor.end("b"))  # there is none; no harm
        await within_deadline(supervisor.start("b", ranks[:1], Heard()))
        assert alive(pids_of(heard)["b 0"])


async def test_a_group_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard, leave_s=0.1) as supervisor:
        worker = spec(tmp_path, SAY_PID + CHILD + STUCK, "b 0")
        await within_deadline(supervisor.start("b", [worker], Heard()))
        await within_deadline(supervisor.end("b"))
        await gone(started_by(heard, "b 0"))


async def test_a_group_of_the_beginning_ends_as_well_and_the_supervisor_goes_on(
    tmp_path: Path,
) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard) as supervisor:
        first = pids_of(heard)["a 0"]
        await within_deadline(supervisor.end("a"))
        assert not runs(first)
        await within_deadline(supervisor.start("b", [spec(tmp_path, READY, "b 0")], Heard()))
        assert deaths(heard) == []


async def test_nobody_waits_any_more_for_a_group_of_the_beginning_that_was_ended(
    tmp_path: Path,
) -> None:
    heard = Heard()
    first = {"a": [spec(tmp_path, LOADS, "a 0")], "b": [spec(tmp_path, READY, "b 0")]}
    supervisor = Supervisor(first, heard)
    async with running(supervisor):
        await heard.wait(is_loading)
        await heard.wait(is_ready)
        waiting = asyncio.create_task(supervisor.all_ready())
        await within_deadline(supervisor.end("a"))
        await asyncio.wait_for(waiting, DEADLINE_S)


async def test_a_group_that_is_ended_while_it_loads_says_so_to_whoever_started_it(
    tmp_path: Path,
) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard) as supervisor:
        worker = spec(tmp_path, SAY_PID + LOADS, "b 0")
        starting = asyncio.create_task(supervisor.start("b", [worker], Heard()))
        await heard.wait(is_loading)
        await within_deadline(supervisor.end("b"))
        with pytest.raises(StartError, match=r"^b: it was ended before it was ready$"):
            await starting
        assert not runs(pids_of(heard)["b 0"])


async def test_who_leaves_while_a_group_loads_takes_it_along(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard) as supervisor:
        worker = spec(tmp_path, SAY_PID + LOADS, "b 0")
        starting = asyncio.create_task(supervisor.start("b", [worker], Heard()))
        await heard.wait(is_loading)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not runs(pids_of(heard)["b 0"])
        assert alive(pids_of(heard)["a 0"])


async def test_however_often_it_is_told_to_leave_it_leaves_nothing(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard, leave_s=1.0) as supervisor:
        stuck = STUBBORN.replace("tell('ready')", "tell('loading', fraction=0.5)")
        worker = spec(tmp_path, SAY_PID + CHILD + stuck, "b 0")
        starting = asyncio.create_task(supervisor.start("b", [worker], Heard()))
        await heard.wait(is_loading)
        starting.cancel()
        await heard.wait(is_asked)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await gone(started_by(heard, "b 0"))


async def test_a_group_that_pauses_before_a_restart_ends_at_once(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard, pauses_s=(600.0,)) as supervisor:
        worker = spec(tmp_path, SAY_PID + READY, "b 0")
        await within_deadline(supervisor.start("b", [worker], Heard()))
        os.kill(pids_of(heard)["b 0"], signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Died))
        await within_deadline(supervisor.end("b"))
        assert sum(is_ready(news) for news in heard.all if news.worker == "b 0") == 1
        await within_deadline(supervisor.start("b", [worker], Heard()))


async def test_workers_of_no_use_are_replaced_by_the_name_of_their_group(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard) as supervisor:
        worker = spec(tmp_path, SAY_PID + READY, "b 0")
        await within_deadline(supervisor.start("b", [worker], Heard()))
        before = pids_of(heard)
        supervisor.replace("c", "it hung")
        supervisor.replace("b", "it hung")
        await heard.wait(lambda news: isinstance(news, Ready) and news.again)
        assert [news.reason for news in heard.all if isinstance(news, Died)] == ["it hung"]
        after = pids_of(heard)
        assert after["a 0"] == before["a 0"]
        assert after["b 0"] != before["b 0"]
        assert not alive(before["b 0"])


async def test_with_the_supervisor_all_groups_end_and_none_begins(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard) as supervisor:
        ready = spec(tmp_path, SAY_PID + READY, "b 0")
        await within_deadline(supervisor.start("b", [ready], Heard()))
        loads = spec(tmp_path, SAY_PID + LOADS, "c 0")
        starting = asyncio.create_task(supervisor.start("c", [loads], Heard()))
        await heard.wait(is_loading)
    with pytest.raises(StartError, match=r"^c: it was ended before it was ready$"):
        await starting
    with pytest.raises(StartError, match=r"^d: all workers are being ended$"):
        await supervisor.start("d", [loads], Heard())
    assert set(pids_of(heard)) == {"a 0", "b 0", "c 0"}


async def test_a_group_that_is_ending_when_all_end_is_ended_wholly(tmp_path: Path) -> None:
    heard = Heard()
    async with supervised(tmp_path, heard, leave_s=1.0) as supervisor:
        worker = spec(tmp_path, CHILD + SAY_PID + STUBBORN, "b 0")
        await within_deadline(supervisor.start("b", [worker], Heard()))
        ending = asyncio.create_task(supervisor.end("b"))
        await heard.wait(is_asked)
    await asyncio.wait_for(ending, DEADLINE_S)
