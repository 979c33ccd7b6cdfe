"""Groups of workers that come and go on this machine, as processes with the scripted engine."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from deploy.commands import command as command_of
from deploy.console import Console
from deploy.further import FurtherGroups
from deploy.groups import LocalGroup, local_groups
from deploy.keeper import Loading, Ready
from deploy.live import LocalWorkers
from deploy.local import socket_folder
from deploy.ranks import first_ranks
from deploy.supervisor import Supervisor
from router.change import ChangeError, Problem, Workers
from router.config import GroupSpec
from shards.v1 import shard_pb2 as pb
from shards.v1.shard_pb2_grpc import ShardStub
from tests.system.server import children
from tests.system.test_serve_groups import command_line
from tests.system.test_supervisor import DEADLINE_S, Heard, running

SCRIPTED = ("--engine", "scripted", "some/model")


@dataclass
class Rig:
    """A server's workers without its router: those, what was told, and where the sockets are."""

    workers: LocalWorkers
    heard: Heard
    folder: Path
    told: list[tuple[str, float]] = field(default_factory=list)

    def tell(self, line: str, loaded: float) -> None:
        self.told.append((line, loaded))

    @property
    def lines(self) -> list[str]:
        return [line for line, _ in self.told]

    async def start(self, text: str) -> GroupSpec:
        async with asyncio.timeout(DEADLINE_S):
            return await self.workers.start(text, self.tell)

    async def start_again(self, name: str) -> GroupSpec:
        async with asyncio.timeout(DEADLINE_S):
            return await self.workers.start_again(name, self.tell)

    async def refused(self, text: str) -> ChangeError:
        with pytest.raises(ChangeError) as caught:
            await self.start(text)
        assert "\n" not in str(caught.value)
        return caught.value

    async def end(self, name: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.workers.end(name)

    def running(self) -> list[str]:
        """The command lines of all workers that run, of whichever group."""
        lines = map(command_line, children(os.getpid()))
        return [line for line in lines if str(self.folder) in line]

    def runs(self, spec: GroupSpec) -> bool:
        """Whether a worker of this group runs."""
        return any(address in line for address in spec.addresses for line in self.running())

    def listens(self, spec: GroupSpec) -> bool:
        """Whether there is a socket of this group."""
        return any(Path(address.removeprefix("unix://")).exists() for address in spec.addresses)


@asynccontextmanager
async def live(*arguments: str, further: type[FurtherGroups] = FurtherGroups) -> AsyncIterator[Rig]:
    """What ``serve`` with these arguments has when its own groups are ready."""
    context = command_of("serve").make_context("serve", list(arguments))
    groups = local_groups(context.params)
    console, heard = Console(as_json=False), Heard()

    def news(one: Any) -> None:
        console.tell(one)
        heard(one)

    with closing(console), socket_folder() as folder:
        supervisor = Supervisor(first_ranks(groups, folder), news)
        made = further(context, groups[0].model.model_id)
        async with running(supervisor):
            async with asyncio.timeout(DEADLINE_S):
                await supervisor.all_ready()
            workers = LocalWorkers(supervisor, groups, made, folder, console)
            rig = Rig(workers, heard, folder)
            yield rig
        assert not rig.running()
        assert not list(folder.iterdir())


async def described(address: str) -> pb.DescribeResponse:
    """What a worker says of itself."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = ShardStub(channel)  # type: ignore[no-untyped-call]
        told: pb.DescribeResponse = await stub.Describe(pb.DescribeRequest(), timeout=DEADLINE_S)
    return told


def program(folder: Path, code: str) -> str:
    """A group in which this program stands in for the workers."""
    path = folder / "python"
    (folder / "program.py").write_text(code)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "program.py"} "$@"\n')
    path.chmod(0o755)
    return f"scripted,worker-python={path}"


# Loads until its standard input is closed.
LOADS = """
import json, sys
print(json.dumps({"event": "loading", "fraction": 0.5}), file=sys.stderr, flush=True)
sys.stdin.read()
"""


async def test_a_further_group_is_what_its_text_and_the_options_of_serve_say(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with live(*SCRIPTED, "--kv-tokens", "5000") as rig:
        workers: Workers = rig.workers  # mypy compares it with the protocol
        assert workers.ends_them
        spec = await rig.start("scripted,num-shard=2,sequences-max=9")
        assert (spec.name, spec.model) == ("scripted-2", "some/model")
        assert len(spec.addresses) == 2
        for rank, address in enumerate(spec.addresses):
            told = await described(address)
            assert (told.rank, told.world, told.model_id) == (rank, 2, "some/model")
            assert (told.sequences_max, told.kv_tokens) == (9, 5000)
        assert len(rig.running()) == 3
    assert rig.told[0] == ("looking for the engine and the files of the model", 0.0)
    assert rig.told[1] == ("scripted-2: starting its workers", 0.0)
    loaded = [fraction for _, fraction in rig.told]
    assert loaded == sorted(loaded)
    assert loaded[-1] == 1.0
    assert any(line.startswith("scripted-2 worker 1: loaded in ") for line in rig.lines)
    console = capfd.readouterr().err
    assert "starting group scripted-2: 2 x scripted\n" in console
    assert "scripted-2 worker 1: loaded in " in console


async def test_names_are_after_the_engine_and_unique() -> None:
    async with live(*SCRIPTED) as rig:
        names = [(await rig.start("scripted")).name, (await rig.start("scripted,name=mine")).name]
        assert names == ["scripted-2", "mine"]
        for taken in ("mine", "scripted"):
            error = await rig.refused(f"scripted,name={taken}")
            assert error.problem is Problem.IMPOSSIBLE
            assert str(error) == f"there is a group {taken}; give this one another name=..."
        await rig.end("scripted")
        await rig.end("mine")
        assert (await rig.start("scripted")).name == "scripted"
        assert (await rig.start("scripted,name=mine")).name == "mine"


async def test_a_group_ends_for_good_and_no_other_gets_its_sockets(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with live(*SCRIPTED) as rig:
        specs = []
        for _ in range(2):
            specs.append(await rig.start("scripted,name=b"))
            await rig.end("b")
            assert not rig.runs(specs[-1])
            assert not rig.listens(specs[-1])
        await rig.end("b")  # there is none any more, and there never was such a one:
        await rig.end("c")
        specs.append(await rig.start_again("b"))
        assert specs[-1].name == "b"
        assert (await described(specs[-1].addresses[0])).model_id == "some/model"
        assert len({spec.addresses for spec in specs}) == 3
        with pytest.raises(ChangeError) as caught:
            await rig.start_again("c")
        assert caught.value.problem is Problem.UNKNOWN
    assert capfd.readouterr().err.count("group b: its workers have been ended\n") == 2


@pytest.mark.parametrize("new", ["scripted,num-shard=2", "scripted,engine-option=bogus=1"])
async def test_the_former_group_comes_back_though_its_successor_had_its_name(new: str) -> None:
    """The way back of ``stop_first``: the new group starts and is refused, or does not start."""
    async with live(*SCRIPTED, "--sequences-max", "7") as rig:
        await rig.end("scripted")
        try:
            assert (await rig.start(new)).name == "scripted"
        except ChangeError:
            assert "bogus" in new
        await rig.end("scripted")
        (address,) = (await rig.start_again("scripted")).addresses
        assert (await described(address)).sequences_max == 7
        assert len(rig.running()) == 1


async def test_a_further_group_comes_back_after_a_switch_that_failed() -> None:
    async with live(*SCRIPTED) as rig:
        await rig.start("scripted,name=b,num-shard=2")
        await rig.end("b")
        await rig.refused("scripted,engine-option=bogus=1")
        assert len((await rig.start_again("b")).addresses) == 2


async def test_a_description_that_makes_no_sense_is_one_line() -> None:
    mistakes = {
        "abacus": "engine: 'abacus' is not one of ",
        "scripted,threads": "'threads' is not KEY=VALUE",
        "scripted,threads=-1": "threads: -1 is not in the range ",
        "scripted,grpc-port=1": "unknown key grpc-port; there is name, model, ",
        "": "engine: '' is not one of ",
    }
    async with live(*SCRIPTED) as rig:
        for text, line in mistakes.items():
            error = await rig.refused(text)
            assert error.problem is Problem.INVALID
            assert str(error).startswith(line)
            with pytest.raises(ChangeError) as caught:
                await rig.workers.check(text, rig.tell)
            assert str(caught.value) == str(error)


async def test_what_is_not_here_is_one_line_before_any_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path))
    missing = {
        "llamacpp,model=/no/such.gguf": "model file /no/such.gguf does not exist",
        "auto,model=/no/such.gguf": "model file /no/such.gguf does not exist",
        "scripted,adapter=a=./no": "adapter a: ./no does not exist",
        f"llamacpp,model={tmp_path}": f"folder {tmp_path} holds no GGUF file",
        "trtllm,model=a/b": "engine trtllm needs the package tensorrt_llm, which is not inst",
        "trtllm,worker-python=/p": "engine trtllm does not read the embedded model, which is a GG",
    }
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    async with live("--engine", "scripted") as rig:
        for text, line in missing.items():
            with pytest.raises(ChangeError) as caught:
                await rig.workers.check(text, rig.tell)
            assert caught.value.problem is Problem.IMPOSSIBLE
            assert str(caught.value).startswith(line)
            assert str(await rig.refused(text)) == str(caught.value)
        assert len(rig.running()) == 1
        assert not any("starting" in line for line in rig.lines)
        given = f"trtllm,model={model},worker-python=/no/such/python"  # which knows for itself
        assert "cannot run /no/such/python" in str(await rig.refused(given))


async def test_a_worker_that_cannot_start_says_so_and_nothing_is_left() -> None:
    async with live(*SCRIPTED) as rig:
        error = await rig.refused("scripted,num-shard=2,engine-option=bogus=1")
        assert error.problem is Problem.IMPOSSIBLE
        assert str(error).startswith("scripted-2 worker ")
        assert "bogus" in str(error)
        assert len(rig.running()) == 1
        assert (await rig.start("scripted")).name == "scripted-2"


async def test_who_leaves_while_a_group_loads_takes_it_along(tmp_path: Path) -> None:
    async with live(*SCRIPTED) as rig:
        starting = asyncio.create_task(rig.start(program(tmp_path, LOADS)))
        await rig.heard.wait(lambda news: news == Loading("scripted-2 worker 0", 0.5))
        assert rig.told[-1] == ("scripted-2: loading", 0.5)
        assert len(rig.running()) == 2
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert len(rig.running()) == 1
        assert (await rig.start("scripted")).name == "scripted-2"


async def test_what_a_worker_says_while_it_loads_is_passed_on(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "for told in ({'event': 'warning', 'message': 'few pages'}, {'event': 'ready'}):\n"
        "    print(json.dumps(told), file=sys.stderr, flush=True)\n"
        "sys.stdin.read()\n"
    )
    async with live(*SCRIPTED) as rig:
        await rig.start(program(tmp_path, code))
        assert ("scripted-2 worker 0: few pages", 0.0) in rig.told
        ready = [news for news in rig.heard.all if isinstance(news, Ready)]
        assert [news.worker for news in ready] == ["worker 0", "scripted-2 worker 0"]


class Slow(FurtherGroups):
    """A download that does not end."""

    goes_on = threading.Event()
    asked = threading.Event()

    def find(self, own: Mapping[str, Any]) -> LocalGroup:
        self.asked.set()
        self.goes_on.wait(DEADLINE_S)
        return super().find(own)


async def test_who_leaves_while_a_model_is_downloaded_does_not_wait_for_it() -> None:
    async with live(*SCRIPTED, further=Slow) as rig:
        starting = asyncio.create_task(rig.start("scripted"))
        await asyncio.to_thread(Slow.asked.wait, DEADLINE_S)
        assert not starting.done()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        (fetching,) = [thread for thread in threading.enumerate() if thread.name == "group"]
        assert fetching.daemon  # nor does the server, at its end
        Slow.goes_on.set()
        await asyncio.to_thread(fetching.join, DEADLINE_S)
        assert len(rig.running()) == 1


async def test_what_was_checked_is_what_starts() -> None:
    """It is not looked for, or downloaded, twice; and what has changed meanwhile is not taken."""
    found = []

    class Counted(FurtherGroups):
        def find(self, own: Mapping[str, Any]) -> LocalGroup:
            found.append(own["engine"])
            return super().find(own)

    async with live(*SCRIPTED, further=Counted) as rig:
        await rig.workers.check("scripted,name=b", rig.tell)
        assert (await rig.start("scripted,name=b")).name == "b"
        assert len(found) == 1
        await rig.workers.check("scripted,name=c", rig.tell)
        assert (await rig.start("scripted,name=d")).name == "d"
        assert len(found) == 3
