"""The supervisor with real processes: small programs in the place of workers."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.keeper import Died, Loading, News, Ready, Said, StartError, WorkerSpec
from deploy.supervisor import Supervisor

DEADLINE_S = 20.0
TELL = """
import json, os, signal, sys, time
def tell(event, **facts): os.write(2, json.dumps({"event": event, **facts}).encode() + b"\\n")
"""
READY = "tell('ready')\nsys.stdin.read()"


def spec(tmp_path: Path, code: str, name: str = "worker 0") -> WorkerSpec:
    socket = tmp_path / f"{name.replace(' ', '-')}.sock"
    return WorkerSpec(name, (sys.executable, "-c", TELL + code), socket)


class Heard:
    """The news so far, and a way to wait for some."""

    def __init__(self) -> None:
        self.all: list[News] = []
        self._more = asyncio.Event()

    def __call__(self, news: News) -> None:
        self.all.append(news)
        self._more.set()

    async def wait(self, wanted: Callable[[News], bool], count: int = 1) -> list[News]:
        async with asyncio.timeout(DEADLINE_S):
            while len(found := [news for news in self.all if wanted(news)]) < count:
                self._more.clear()
                await self._more.wait()
        return found


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        task.cancel()
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(task, return_exceptions=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_pid(news: News) -> bool:
    return isinstance(news, Said) and news.line.startswith("pid ")


def pid_of(news: News) -> int:
    assert isinstance(news, Said)
    return int(news.line.split()[1])


SAY_PID = "print('pid', os.getpid(), file=sys.stderr, flush=True)\n"


async def test_it_relays_progress_and_ends_the_worker_on_the_way_out(tmp_path: Path) -> None:
    heard = Heard()
    code = SAY_PID + "tell('listening')\ntell('loading', fraction=0.5)\n" + READY
    supervisor = Supervisor({"a": [spec(tmp_path, code)]}, heard)
    async with running(supervisor):
        async with asyncio.timeout(DEADLINE_S):
            await supervisor.all_ready()
        pid = pid_of(heard.all[0])
        assert alive(pid)
    assert heard.all[1] == Loading("worker 0", 0.5)
    assert isinstance(heard.all[2], Ready)
    assert not heard.all[2].again
    assert not alive(pid)


async def test_all_ready_means_every_worker(tmp_path: Path) -> None:
    heard = Heard()
    late = "tell('loading', fraction=0.1)\nsys.stdin.read()"
    workers = [spec(tmp_path, READY), spec(tmp_path, late, "worker 1")]
    supervisor = Supervisor({worker.name: [worker] for worker in workers}, heard)
    async with running(supervisor):
        await heard.wait(lambda news: isinstance(news, Ready))
        await heard.wait(lambda news: isinstance(news, Loading))
        waiting = asyncio.create_task(supervisor.all_ready())
        done, _ = await asyncio.wait([waiting], timeout=0)
        assert not done
        waiting.cancel()


async def test_a_killed_worker_is_started_again(tmp_path: Path) -> None:
    heard = Heard()
    supervisor = Supervisor({"a": [spec(tmp_path, SAY_PID + READY)]}, heard)
    async with running(supervisor):
        await heard.wait(lambda news: isinstance(news, Ready))
        os.kill(pid_of(heard.all[0]), signal.SIGKILL)
        back = await heard.wait(lambda news: isinstance(news, Ready) and news.again)
    (died,) = [news for news in heard.all if isinstance(news, Died)]
    assert died.reason == "killed by SIGKILL"
    assert died.deaths == 1
    assert back


async def test_a_worker_of_no_use_is_replaced_but_not_while_it_loads(tmp_path: Path) -> None:
    heard, loaded = Heard(), tmp_path / "loaded"
    load = f"while not os.path.exists({str(loaded)!r}): time.sleep(0.01)\n"
    code = SAY_PID + "tell('loading', fraction=0.1)\n" + load + READY
    supervisor = Supervisor({"a": [spec(tmp_path, code)]}, heard)
    supervisor.replace("a", "before there is one")
    async with running(supervisor):
        await heard.wait(lambda news: isinstance(news, Loading))
        supervisor.replace("a", "it loads")
        loaded.touch()
        await heard.wait(lambda news: isinstance(news, Ready))
        os.kill(pid_of(heard.all[0]), signal.SIGSTOP)  # such a one leaves by nothing but SIGKILL
        supervisor.replace("a", "it hung")
        await heard.wait(lambda news: isinstance(news, Ready), 2)
        died = [news for news in heard.all if isinstance(news, Died)]
        assert [one.reason for one in died] == ["it hung"]
    first, second = (pid_of(news) for news in heard.all if is_pid(news))
    assert first != second
    assert not alive(first)


async def test_a_stale_socket_is_taken_away_before_each_start(tmp_path: Path) -> None:
    worker = spec(tmp_path, f"tell('ready') if not os.path.exists({str(tmp_path)!r} + "
                            "'/worker-0.sock') else tell('error', message='stale')\n"
                            "sys.stdin.read()")  # fmt: skip
    worker.socket.touch()
    heard = Heard()
    async with running(Supervisor({"a": [worker]}, heard)):
        await heard.wait(lambda news: isinstance(news, Ready))


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("tell('error', message='x.gguf is corrupt')\nsys.exit(1)", "x.gguf is corrupt"),
        ("print('no cheese', file=sys.stderr)\nsys.exit(3)", "ended with status 3: no cheese"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", "killed by signal 37"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL; if nobody did that, the system ran out of memory: a smaller model, "
            "or fewer --kv-tokens, takes less",
        ),
        ("sys.exit(0)", "ended with status 0"),
    ],
)  # fmt: skip
async def test_a_worker_that_never_gets_ready_ends_it_with_one_line(
    tmp_path: Path, code: str, line: str
) -> None:
    supervisor = Supervisor(
        {"a": [spec(tmp_path, code)], "b": [spec(tmp_path, READY, "worker 1")]}, Heard()
    )
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(StartError, match=f"^worker 0: {line}$"):
            await supervisor.run()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("sys.exit(1)", "ended with status 1; is it one"),
        ("print('no it', file=sys.stderr)\nsys.exit(1)", "ended with status 1: no it; is it one"),
        ("tell('loading', fraction=0.1)\nsys.exit(1)", "ended with status 1"),
        ("tell('error', message='x.gguf is corrupt')\nsys.exit(1)", "x.gguf is corrupt"),
    ],
)  # fmt: skip
async def test_a_program_that_says_nothing_as_a_worker_would_is_doubted(
    tmp_path: Path, code: str, line: str
) -> None:
    doubted = replace(spec(tmp_path, code), doubt="is it one")
    with pytest.raises(StartError, match=f"^worker 0: {line}$"):
        await Supervisor({"a": [doubted]}, Heard()).run()


async def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    worker = WorkerSpec("worker 0", ("/no/such/python",), tmp_path / "socket")
    with pytest.raises(StartError, match="worker 0: cannot run /no/such/python"):
        await Supervisor({"a": [worker]}, Heard()).run()


async def test_pauses_between_deaths_grow_and_are_bounded(tmp_path: Path) -> None:
    heard = Heard()
    worker = spec(tmp_path, "tell('ready')\nsys.exit(3)")
    async with running(Supervisor({"a": [worker]}, heard, pauses_s=(0.0, 0.001, 0.002))):
        deaths = await heard.wait(lambda news: isinstance(news, Died), count=4)
    told = [(news.deaths, news.pause_s) for news in deaths if isinstance(news, Died)]
    assert told[:4] == [(1, 0.0), (2, 0.001), (3, 0.002), (4, 0.002)]


async def test_a_worker_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    heard = Heard()
    code = SAY_PID + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntell('ready')\ntime.sleep(600)"
    async with running(Supervisor({"a": [spec(tmp_path, code)]}, heard, leave_s=0.1)):
        await heard.wait(lambda news: isinstance(news, Ready))
        pid = pid_of(heard.all[0])
    assert not alive(pid)


async def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(tmp_path: Path) -> None:
    heard = Heard()
    code = "print('pid', os.getpgid(0), file=sys.stderr, flush=True)\n" + READY
    async with running(Supervisor({"a": [spec(tmp_path, code)]}, heard)):
        await heard.wait(lambda news: isinstance(news, Ready))
        assert pid_of(heard.all[0]) != os.getpgid(0)


async def test_what_a_worker_says_for_a_person_is_passed_on(tmp_path: Path) -> None:
    heard = Heard()
    code = (
        "tell('warning', message='few pages')\n"
        "def leave(*_): tell('leaving', message='again')\nsignal.signal(signal.SIGTERM, leave)\n"
        "tell('leaving', message='waiting for the router', limit_s=3)\n" + READY
    )
    async with running(Supervisor({"a": [spec(tmp_path, code)]}, heard)):
        await heard.wait(lambda news: isinstance(news, Ready))
    # What it says when it is asked to leave here is nothing that a person has to know.
    said = [news for news in heard.all if isinstance(news, Said)]
    assert said == [Said("worker 0", "few pages"), Said("worker 0", "waiting for the router")]


async def test_lines_of_any_length_and_content_do_no_harm(tmp_path: Path) -> None:
    heard = Heard()
    code = (
        "os.write(2, b'x' * 300_000 + b'\\n')\n"
        "os.write(2, b'\\xff{\\n')\n"
        "os.write(2, b'{1\\n[]\\n')\n"
        "os.write(2, b'{\"a\":' * 10_000 + b'\\n')\n" + READY
    )
    async with running(Supervisor({"a": [spec(tmp_path, code)]}, heard)):
        await heard.wait(lambda news: isinstance(news, Ready))
    said = "".join(news.line for news in heard.all if isinstance(news, Said))
    assert said.count("x") == 300_000
    assert said.removesuffix('{"a":' * 10_000).endswith("\ufffd{{1[]")
