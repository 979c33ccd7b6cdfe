"""Groups of several ranks under the supervisor: they live and die together."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from time import monotonic

import pytest

from deploy.groups import LocalGroup
from deploy.keeper import Died, News, Ready, Said, StartError, WorkerSpec, free_address
from deploy.models import Model
from deploy.ranks import first_ranks
from deploy.supervisor import Supervisor
from deploy.workers import WorkerOptions
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

DOWN_S = 5.0
SAY_ARGV = "print('argv', *sys.argv[1:], file=sys.stderr, flush=True)\n"
# As a rank inside an exchange with one that is gone: it hears nothing.
STUCK = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell('ready')\ntime.sleep(600)"


def ranks(tmp_path: Path, *codes: str) -> list[WorkerSpec]:
    return [spec(tmp_path, code, f"worker {rank}") for rank, code in enumerate(codes)]


def is_ready(news: News) -> bool:
    return isinstance(news, Ready)


def pids_of(heard: Heard) -> dict[str, int]:
    """The process of each worker, of its last life so far."""
    return {
        news.worker: pid_of(news) for news in heard.all if isinstance(news, Said) and is_pid(news)
    }


def argvs(heard: Heard, worker: str) -> list[str]:
    """What this worker was told in each of its lives."""
    return [
        news.line
        for news in heard.all
        if isinstance(news, Said) and news.worker == worker and news.line.startswith("argv")
    ]


@pytest.mark.parametrize("killed", [0, 1])
async def test_when_a_rank_is_killed_all_end_and_come_back_elsewhere(
    tmp_path: Path, killed: int
) -> None:
    heard = Heard()
    code = SAY_PID + SAY_ARGV + READY
    async with running(Supervisor({"a": ranks(tmp_path, code, code)}, heard)):
        await heard.wait(is_ready, 2)
        pids = pids_of(heard)
        os.kill(pids[f"worker {killed}"], signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Ready) and news.again, 2)
        assert not any(map(alive, pids.values()))
    (died,) = [news for news in heard.all if isinstance(news, Died)]
    assert (died.worker, died.reason) == (f"worker {killed}", "killed by SIGKILL")
    assert (died.deaths, died.ranks) == (1, 2)
    first, second = argvs(heard, "worker 0")
    assert argvs(heard, "worker 1") == [first, second]
    assert first.startswith("argv --rendezvous 127.0.0.1:")
    assert second.startswith("argv --rendezvous 127.0.0.1:")
    assert first != second


async def test_a_rank_that_is_stuck_is_killed_soon(tmp_path: Path) -> None:
    heard = Heard()
    async with running(
        Supervisor({"a": ranks(tmp_path, SAY_PID + READY, SAY_PID + STUCK)}, heard, leave_s=60.0)
    ):
        await heard.wait(is_ready, 2)
        pids = pids_of(heard)
        began = monotonic()
        os.kill(pids["worker 0"], signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Died))
        assert monotonic() - began < DOWN_S
        assert not alive(pids["worker 1"])
        await heard.wait(lambda news: isinstance(news, Ready) and news.again, 2)
        os.kill(pids_of(heard)["worker 1"], signal.SIGKILL)  # or the end would take leave_s


async def test_another_group_goes_on(tmp_path: Path) -> None:
    heard = Heard()
    code = SAY_PID + READY
    groups = {
        "a": [spec(tmp_path, code, "a 0"), spec(tmp_path, code, "a 1")],
        "b": [spec(tmp_path, code, "b")],
    }
    supervisor = Supervisor(groups, heard)
    async with running(supervisor):
        async with asyncio.timeout(DEADLINE_S):
            await supervisor.all_ready()
        pids = pids_of(heard)
        os.kill(pids["a 1"], signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Ready) and news.again, 2)
        assert alive(pids["b"])
    assert {news.worker for news in heard.all if isinstance(news, Died)} == {"a 1"}


async def test_a_group_is_ready_when_its_last_rank_is(tmp_path: Path) -> None:
    heard = Heard()
    gate = tmp_path / "gate"
    late = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n" + READY
    supervisor = Supervisor({"a": ranks(tmp_path, READY, late)}, heard)
    async with running(supervisor):
        await heard.wait(is_ready)
        waiting = asyncio.create_task(supervisor.all_ready())
        done, _ = await asyncio.wait([waiting], timeout=0)
        assert not done
        gate.touch()
        async with asyncio.timeout(DEADLINE_S):
            await waiting
    assert [news.again for news in heard.all if isinstance(news, Ready)] == [False, False]


async def test_a_rank_that_cannot_start_ends_it_with_one_line_and_no_process(
    tmp_path: Path,
) -> None:
    heard = Heard()
    failing = "tell('error', message='3 heads do not divide by 2')\nsys.exit(1)"
    supervisor = Supervisor({"a": ranks(tmp_path, SAY_PID + READY, failing)}, heard)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(StartError, match=r"^worker 1: 3 heads do not divide by 2$"):
            await supervisor.run()
    assert not any(alive(pid_of(news)) for news in heard.all if is_pid(news))


async def test_a_rendezvous_that_was_taken_meanwhile_is_chosen_anew(tmp_path: Path) -> None:
    heard = Heard()
    taken = (
        f"first = not os.path.exists({str(tmp_path / 'been')!r})\n"
        f"open({str(tmp_path / 'been')!r}, 'w').close()\n" + SAY_ARGV + "if first:\n"
        "    print('bind: Address already in use', file=sys.stderr)\n    sys.exit(1)\n"
    )
    supervisor = Supervisor({"a": ranks(tmp_path, taken + READY, READY)}, heard, pauses_s=(0.0,))
    async with running(supervisor), asyncio.timeout(DEADLINE_S):
        await supervisor.all_ready()
    assert len(set(argvs(heard, "worker 0"))) == 2
    assert [news.again for news in heard.all if isinstance(news, Ready)][-2:] == [False, False]


async def test_a_rendezvous_that_is_always_taken_is_one_line(tmp_path: Path) -> None:
    heard = Heard()
    taken = SAY_ARGV + "tell('error', message='EADDRINUSE')\nsys.exit(1)"
    supervisor = Supervisor({"a": ranks(tmp_path, taken, READY)}, heard, pauses_s=(0.0,))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(StartError, match=r"^worker 0: EADDRINUSE$"):
            await supervisor.run()
    assert len(argvs(heard, "worker 0")) == 3


async def test_one_rank_alone_needs_no_rendezvous_and_its_taken_port_is_an_error(
    tmp_path: Path,
) -> None:
    heard = Heard()
    taken = SAY_ARGV + "tell('error', message='Address already in use')\nsys.exit(1)"
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(StartError):
            await Supervisor({"a": ranks(tmp_path, taken)}, heard).run()
    assert argvs(heard, "worker 0") == ["argv"]


async def gone(pids: list[int]) -> None:
    """Waits for the end of killed processes: the kernel's to make, and nobody's who is here to see.

    The supervisor waits for workers, and kills what they have started.
    """
    async with asyncio.timeout(DEADLINE_S):
        while any(map(runs, pids)):
            await asyncio.sleep(0.005)


async def test_what_a_worker_has_started_ends_with_it(tmp_path: Path) -> None:
    """A child that holds the worker's standard error open, and would keep it alive to the eye."""
    heard = Heard()
    code = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('pid', child.pid, file=sys.stderr, flush=True)\n" + SAY_PID + READY
    )
    async with running(Supervisor({"a": ranks(tmp_path, code)}, heard)):
        await heard.wait(is_ready)
        child, worker = (pid_of(news) for news in heard.all if is_pid(news))
        os.kill(worker, signal.SIGKILL)
        await heard.wait(lambda news: isinstance(news, Ready) and news.again)
        await gone([child])
        children = [pid_of(news) for news in heard.all if is_pid(news)]
    await gone(children)


async def test_a_report_that_makes_no_sense_does_no_harm(tmp_path: Path) -> None:
    heard = Heard()
    code = "tell('loading', fraction='half')\ntell('loading')\n" + READY
    async with running(Supervisor({"a": ranks(tmp_path, code)}, heard)):
        await heard.wait(is_ready)


def test_each_rank_is_told_its_place(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", "m")
    options = WorkerOptions("torch", world=2, device="cuda:2,cuda:5", adapters=("a=/b",))
    specs = first_ranks([LocalGroup("torch", model, options)], tmp_path)["torch"]
    assert [one.name for one in specs] == ["worker 0", "worker 1"]
    for rank, one in enumerate(specs):
        line = " ".join(one.command)
        assert f"--rank {rank} --world 2" in line
        assert f"--device cuda:{(2, 5)[rank]}" in line
        assert "--adapter a=/b" in line
        assert one.env == {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    assert len({one.socket for one in specs}) == 2


def test_of_several_groups_each_worker_is_named_with_its_group(tmp_path: Path) -> None:
    model = Model(None, "m")
    groups = [
        LocalGroup("torch", model, WorkerOptions("torch")),
        LocalGroup("cpu", model, WorkerOptions("llamacpp", device="x", interpreter=sys.executable)),
    ]
    (torch,), (cpu,) = first_ranks(groups, tmp_path).values()
    assert (torch.name, cpu.name) == ("torch worker 0", "cpu worker 0")
    assert torch.socket != cpu.socket
    assert "--device x" in " ".join(cpu.command)


def test_the_rendezvous_is_free_on_this_machine() -> None:
    host, _, port = free_address().partition(":")
    with socket.socket() as listener:
        listener.bind((host, int(port)))
