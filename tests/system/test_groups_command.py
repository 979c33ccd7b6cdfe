"""``roundhouse groups`` and ``switch``, as processes, before a router with scripted workers."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.control import control_socket, find_socket
from deploy.groups_client import Shown, table
from router.api.groups_face import serving
from router.v1 import groups_pb2 as pb
from tests.service.change_rig import over, rig_of
from tests.service.fakes import until
from tests.system.server import (
    STOP_S,
    Server,
    end,
    eventually,
    read_lines,
    ready,
    start_router,
)
from tests.system.test_cli import only_line, roundhouse

SHORT = {"inputs": "Count", "parameters": {"max_new_tokens": 8}}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / "control"))
    monkeypatch.delenv("PORT", raising=False)


@contextmanager
def worker(folder: Path, name: str, model: str = "m") -> Iterator[str]:
    """A scripted worker that listens; its address."""
    address = f"unix://{folder}/{name}.sock"
    command = [sys.executable, "-m", "shards", "--engine", "scripted", "--model-id", model]
    process = subprocess.Popen(
        [*command, "--listen", address, "--exit-with-parent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        read_lines(process, lambda line: '"ready"' in line)
        yield address
    finally:
        end(process)
        assert process.stdin is not None
        process.stdin.close()


class Routed:
    """A running router, its port, and the command that asks it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.port = server.rest.rpartition(":")[2]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return roundhouse(*arguments, PORT=self.port)

    def groups(self) -> dict[str, dict[str, Any]]:
        shown = self.run("groups", "--json")
        assert shown.returncode == 0, shown.stderr
        return {group["name"]: group for group in json.loads(shown.stdout)["groups"]}

    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def answers(self) -> bool:
        return self.server.client.post("/generate", json=SHORT).status_code == 200


@contextmanager
def routed(folder: Path, *addresses: str) -> Iterator[Routed]:
    """A router that is ready, before workers of these addresses."""
    given = [text for address in addresses for text in ("--worker", address)]
    with (folder / "stderr").open("w") as errors:
        process = start_router(tuple(given), errors)
        try:
            server = Server(process, ready(process, folder / "stderr"))
            with server.client:
                yield Routed(server, folder)
        finally:
            end(process)


@pytest.fixture
def workers() -> Iterator[ExitStack]:
    """Workers that end with the test."""
    with ExitStack() as stack:
        yield stack


def test_groups_are_listed_added_and_removed_while_the_router_serves(
    tmp_path: Path, workers: ExitStack
) -> None:
    one, two = (workers.enter_context(worker(tmp_path, name)) for name in ("one", "two"))
    with routed(tmp_path, one) as router:
        shown = router.run("groups")
        heads, row = shown.stdout.splitlines()
        assert heads.split()[:5] == ["group", "state", "model", "engine", "device"]
        assert row.split()[:4] == ["group-0", "up", "m", "scripted"]
        added = router.run("groups", "add", two)
        assert added.stdout.startswith("group-1 serves m: scripted on "), added.stderr
        assert (added.returncode, added.stderr) == (0, "")
        assert [group["state"] for group in router.groups().values()] == ["up", "up"]
        assert router.groups()["group-1"]["addresses"] == [two]
        removed = router.run("groups", "remove", "group-0", "--timeout", "5")
        assert (removed.returncode, removed.stdout) == (0, "group-0 has been removed\n")
        assert set(router.groups()) == {"group-1"}
        assert router.answers()
        # A name is not given twice: metrics would say of one what was the other's.
        assert router.run("groups", "add", one).stdout.startswith("group-2 serves m")


def test_a_group_takes_the_place_of_all_others(tmp_path: Path, workers: ExitStack) -> None:
    one, two, new = (workers.enter_context(worker(tmp_path, name)) for name in ("1", "2", "3"))
    with routed(tmp_path, one, two) as router:
        done = router.run("switch", new)
        assert done.stdout == "group-2 serves m in the place of: group-0, group-1\n", done.stderr
        assert {name: group["state"] for name, group in router.groups().items()} == {
            "group-2": "up"
        }
        assert router.answers()


def test_what_cannot_be_is_one_line_and_changes_nothing(tmp_path: Path, workers: ExitStack) -> None:
    one = workers.enter_context(worker(tmp_path, "one"))
    other = workers.enter_context(worker(tmp_path, "other", model="n"))
    with routed(tmp_path, one) as router:
        for arguments, told in (
            (("groups", "remove", "none"), "no group is called none; there is: group-0"),
            (("groups", "remove", "group-0"), "group-0 is the only group that serves m now"),
            (("groups", "add", "nowhere"), "worker 'nowhere' must be unix:///path or host:port"),
            (("groups", "add", one), f"worker {one} is in group group-0"),
            (("switch", other), "serves n, and no other group does"),
            (("switch", other, "--stop-first"), "the workers of this router run elsewhere"),
        ):
            refused = router.run(*arguments)
            assert refused.returncode == 1
            assert told in only_line(refused)
        assert set(router.groups()) == {"group-0"}
        assert router.answers()


@contextmanager
def silent_worker() -> Iterator[str]:
    """Somebody who listens and says nothing, as a worker whose machine is very busy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_group_that_does_not_serve_in_time_is_taken_away(
    tmp_path: Path, workers: ExitStack
) -> None:
    one = workers.enter_context(worker(tmp_path, "one"))
    with routed(tmp_path, one) as router, silent_worker() as address:
        refused = router.run("groups", "add", address, "--timeout", "3")
        assert refused.returncode == 1
        waiting, error = refused.stderr.splitlines()
        assert waiting == f"group-1: waiting for {address}"
        assert error == f"roundhouse: error: {address} did not serve within 3 s"
        assert set(router.groups()) == {"group-0"}


def test_an_interrupted_command_takes_back_what_does_not_serve_yet(
    tmp_path: Path, workers: ExitStack
) -> None:
    one = workers.enter_context(worker(tmp_path, "one"))
    with routed(tmp_path, one) as router, silent_worker() as address:
        command = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "groups", "add", address, "--port", router.port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: f"adding {address}" in router.log())
        busy = router.run("groups", "remove", "group-0")
        assert f"another change is under way: adding {address}" in only_line(busy)
        command.send_signal(signal.SIGINT)
        shown, errors = command.communicate(timeout=STOP_S)
        assert (command.returncode, shown) == (130, "")
        assert "interrupted: the group is taken away again" in errors
        eventually(lambda: "given up, as whoever asked for it has left" in router.log())
        assert set(router.groups()) == {"group-0"}


async def interrupted(port: int, *arguments: str, when: Callable[[], object]) -> tuple[int, str]:
    """The status and the errors of a command that gets a Ctrl-C at some instant."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", *arguments, "--port", str(port)),
        stderr=asyncio.subprocess.PIPE,
    )
    await until(when)
    command.send_signal(signal.SIGINT)
    _, errors = await command.communicate()
    assert command.returncode is not None
    return command.returncode, errors.decode()


async def test_an_interrupted_removal_goes_on_and_says_so() -> None:
    async with rig_of("a", "b") as rig, serving(rig.changes, control_socket(3999)):
        rig.groups.emptied.clear()
        status, errors = await interrupted(
            3999, "groups", "remove", "a", when=lambda: rig.groups.removals
        )
        assert (status, errors) == (130, "interrupted: a goes on leaving\n")
        rig.groups.emptied.set()
        await over(rig.changes)
        assert rig.serving == (["b"], ["b"])


async def test_an_interrupted_switch_leaves_everything_as_it_was() -> None:
    async with rig_of("a") as rig, serving(rig.changes, control_socket(3999)):
        rig.groups.connecting.clear()
        status, errors = await interrupted(
            3999, "switch", "new", "--stop-first", when=lambda: "new" in rig.groups.entries
        )
        assert status == 130
        assert errors.startswith("interrupted: if the new group serves already")
        rig.groups.connecting.set()
        await over(rig.changes)
        assert rig.serving == (["a"], ["a"])


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for arguments in (("groups",), ("groups", "add", "a:1"), ("switch", "a:1")):
        line = only_line(roundhouse(*arguments, PORT="3999"))
        assert "there is no server on port 3999 that could be asked, or it is not ready yet" in line
        assert "a gateway has no groups: its router has them" in line
    folder = tmp_path / "control"
    folder.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(folder / "3999.sock"))
    line = only_line(roundhouse("groups", "--port", "3999"))
    assert "the server on port 3999 has ended, or takes no changes" in line


def test_a_folder_that_others_can_enter_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control").chmod(0o755)
    line = only_line(roundhouse("groups"))
    assert line.endswith(f"is open to others; chmod 700 {tmp_path / 'control'} closes it")


def test_the_socket_is_closed_to_others_and_goes_with_the_router(
    tmp_path: Path, workers: ExitStack
) -> None:
    one = workers.enter_context(worker(tmp_path, "one"))
    with routed(tmp_path, one) as router:
        path = find_socket(int(router.port))
        assert path == tmp_path / "control" / f"{router.port}.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.parent.exists()


def test_a_router_without_a_place_for_its_socket_serves(
    tmp_path: Path, workers: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = workers.enter_context(worker(tmp_path, "one"))
    monkeypatch.setenv("ROUNDHOUSE_CONTROL", str(tmp_path / ("long" * 30)))
    with routed(tmp_path, one) as router:
        assert router.answers()
        lines = [line for line in router.log().splitlines() if "groups cannot be changed" in line]
        assert len(lines) == 1
        assert "the path of a socket may have 100" in lines[0]
        assert "the path of a socket may have 100" in only_line(router.run("groups"))


# --- parts


def test_the_socket_is_in_a_folder_of_the_users_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert control_socket(1) == tmp_path / "control" / "1.sock"
    monkeypatch.delenv("ROUNDHOUSE_CONTROL")
    runtime = tmp_path / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert control_socket(2) == runtime / "roundhouse" / "2.sock"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"roundhouse-{os.geteuid()}" / "3.sock"
    assert find_socket(3) == control_socket(3)
    own.parent.mkdir()
    own.touch()
    assert find_socket(3) == own, "of a server that was started without XDG_RUNTIME_DIR"
    for nobodys in ("", str(tmp_path / "none")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", nobodys)
        assert control_socket(3) == own
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    me = os.geteuid()
    monkeypatch.setattr("os.geteuid", lambda: me + 1)
    assert control_socket(3).parent == tmp_path / f"roundhouse-{me + 1}", "another's is left alone"


def test_the_table_shows_what_people_ask_for() -> None:
    up = pb.GroupStatus(
        name="torch", state=pb.GROUP_STATE_UP, model="m", engine="torch", device="cpu",
        addresses=["unix:///t"], running=3, kv_tokens=65536, kv_used=2000, kv_cached=10,
    )  # fmt: skip
    down = pb.GroupStatus(name="g", state=pb.GROUP_STATE_DOWN, addresses=["gpu1:1", "gpu2:1"])
    lines = table(pb.ListGroupsResponse(groups=[up, down], waiting=2))
    assert lines[1].split() == ["torch", "up", "m", "torch", "cpu", "3", "2,000", "10", "65,536"]
    assert lines[2].split() == ["g", "down", "-", "-", "-", "0", "0", "0", "0"]
    assert lines[3] == "  at gpu1:1, gpu2:1"
    assert lines[5] == "requests that wait for a place: 2"


def test_progress_is_shown_once_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Shown()
    for line, loaded in (("a: loading", 0.1), ("a: loading", 0.2), ("b", 1.0), ("b", 0.5)):
        shown._show(line, loaded)
    monkeypatch.setattr("deploy.groups_client.LOADING_LINE_S", 0.0)
    shown._show("b", 0.75)
    shown._show("b", 0.75)
    assert capsys.readouterr().err == "a: loading, 10%\nb\nb, 75%\n"
    with Shown() as shown:
        shown.tell("soon done", 0.0)
    assert capsys.readouterr().err == ""
