"""``router.v1.Groups`` on a real socket, before changes of groups that are none."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.api import groups_face
from router.api.groups_face import LINES_MAX, SERVICE, Lines, offered, serving
from router.api.groups_socket import address_of, check_folder
from router.config import GroupSpec
from router.v1 import groups_pb2 as pb
from router.v1.groups_pb2_grpc import GroupsStub
from tests.service.change_rig import LIMIT_S, Rig, over, rig_of
from tests.service.fakes import until
from tests.service.grpc_rig import details_of, failure


def socket_in(folder: Path) -> Path:
    return folder / "of mine" / "3000.sock"


@asynccontextmanager
async def channel_of(rig: Rig, folder: Path) -> AsyncIterator[grpc.aio.Channel]:
    path = socket_in(folder)
    async with serving(rig.changes, path), grpc.aio.insecure_channel(address_of(path)) as channel:
        yield channel


@asynccontextmanager
async def face_of(folder: Path, *names: str) -> AsyncIterator[tuple[Rig, Any]]:
    """Changes that are served, and a client of theirs."""
    async with rig_of(*names) as rig, channel_of(rig, folder) as channel:
        yield rig, GroupsStub(channel)  # type: ignore[no-untyped-call]


async def lines_of(call: Any) -> list[str]:
    return [progress.line async for progress in call]


# --- the methods


async def test_groups_are_listed_as_they_are(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a") as (rig, stub):
        rig.groups.entries["a"].running = 2
        rig.groups.add(GroupSpec("b", "named", ("host:1", "host:2")))
        answer = await stub.ListGroups(pb.ListGroupsRequest())
        assert answer.waiting == 3
        first, second = answer.groups
        assert first == pb.GroupStatus(
            name="a", state=pb.GROUP_STATE_UP, model="m", engine="scripted", engine_version="1",
            device="cpu", addresses=["unix:///a"], running=2, kv_tokens=1000,
        )  # fmt: skip
        assert (second.name, second.model, second.engine) == ("b", "named", "")
        assert second.state == pb.GROUP_STATE_DOWN
        assert list(second.addresses) == ["host:1", "host:2"]
        rig.groups.entries["a"].state = "leaving"
        answer = await stub.ListGroups(pb.ListGroupsRequest())
        assert answer.groups[0].state == pb.GROUP_STATE_LEAVING


async def test_groups_are_added_removed_and_switched(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a", "b") as (rig, stub):
        assert await lines_of(stub.RemoveGroup(pb.RemoveGroupRequest(name="a", limit_s=2))) == [
            "a takes no more requests; sequences that run there: 0",
            "a has been removed",
        ]
        assert rig.groups.removals == [("a", 2, False)]
        lines = await lines_of(stub.AddGroup(pb.AddGroupRequest(group="new")))
        assert lines[-1] == "new serves m: scripted on cpu"
        rig.groups.models["newer"] = "m"
        request = pb.SwitchGroupsRequest(group="newer", stop_first=True)
        lines = await lines_of(stub.SwitchGroups(request))
        assert lines[0] == "ending b, new; requests wait"
        assert rig.serving == (["newer"], ["newer"])
        rig.groups.models["newest"] = "m"
        lines = await lines_of(stub.SwitchGroups(pb.SwitchGroupsRequest(group="newest")))
        assert lines[-1] == "newest serves m in the place of: newer"
        assert rig.groups.removals[-1] == ("newer", LIMIT_S, False)


async def test_refusals_have_a_code_a_line_and_a_reason(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a") as (rig, stub):
        rig.workers.start_errors["new"] = "no room"
        found = {}
        for method, request in (
            (stub.AddGroup, pb.AddGroupRequest(group="new")),
            (stub.AddGroup, pb.AddGroupRequest(group="new", limit_s=-1)),
            (stub.RemoveGroup, pb.RemoveGroupRequest(name="none")),
            (stub.RemoveGroup, pb.RemoveGroupRequest(name="a")),
            (stub.SwitchGroups, pb.SwitchGroupsRequest(group="new")),
        ):
            error = await failure(method(request))
            found[error.details()] = error.code().name, details_of(error)["ErrorInfo"].reason
        assert found == {
            "no room": ("FAILED_PRECONDITION", "GROUP_IMPOSSIBLE"),
            "limit_s (seconds) must be from 0 to 31,536,000, not -1": (
                *("INVALID_ARGUMENT", "GROUP_INVALID"),
            ),
            "no group is called none; there is: a": ("NOT_FOUND", "GROUP_UNKNOWN"),
            "a is the only group that serves m now: add another one first, or switch to one in its "
            "place": ("FAILED_PRECONDITION", "GROUP_IMPOSSIBLE"),
        }


async def test_a_limit_of_time_is_kept(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a") as (rig, stub):
        rig.workers.loading.clear()
        error = await failure(stub.AddGroup(pb.AddGroupRequest(group="new", limit_s=0.01)))
        assert error.details() == "new did not serve within 0.01 s"


async def test_bytes_that_are_no_request_are_refused(tmp_path: Path) -> None:
    async with rig_of("a") as rig, channel_of(rig, tmp_path) as channel:
        for method in ("ListGroups", "AddGroup"):
            call = channel.unary_stream(f"/{SERVICE}/{method}")
            assert (await failure(call(b"\xff"))).code() is grpc.StatusCode.INVALID_ARGUMENT
        error = await failure(call(bytes(2**17)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_and_reflection_are_there(tmp_path: Path) -> None:
    async with rig_of("a") as rig, channel_of(rig, tmp_path) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [one async for one in stub.ServerReflectionInfo(iter([asked]))]
        assert SERVICE in {one.name for one in answer.list_services_response.service}


# --- callers who leave, or stand still


async def test_a_group_whose_caller_leaves_before_it_serves_goes(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a") as (rig, stub):
        rig.groups.connecting.clear()
        call = stub.AddGroup(pb.AddGroupRequest(group="new"))
        async for progress in call:
            if progress.line.startswith("new: its workers have loaded"):
                assert progress.loaded == 1
                break
        call.cancel()
        await over(rig.changes)
        assert rig.serving == (["a"], ["a"])


async def test_a_removal_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    async with face_of(tmp_path, "a", "b") as (rig, stub):
        rig.groups.emptied.clear()
        call = stub.RemoveGroup(pb.RemoveGroupRequest(name="a"))
        await anext(aiter(call))
        call.cancel()
        await until(call.done)
        error = await failure(stub.AddGroup(pb.AddGroupRequest(group="new")))
        assert "another change is under way: removing a" in str(error.details())
        rig.groups.emptied.set()
        await over(rig.changes)
        assert rig.serving == (["b"], ["b"])


async def test_lines_that_nobody_reads_give_way_to_the_latest() -> None:
    lines = Lines()
    for number in range(3 * LINES_MAX):
        lines.tell(f"line {number}", 0)
    for percent in range(100):
        lines.tell("loading", percent / 100)
    lines.end()
    read = [(one.line, round(one.loaded, 2)) async for one in lines.read()]
    assert len(read) == LINES_MAX
    assert read[-2:] == [(f"line {3 * LINES_MAX - 1}", 0), ("loading", 0.99)]


async def test_a_reader_who_stands_still_holds_up_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_face, "READ_S", 0.01)
    async with face_of(tmp_path, "a") as (rig, stub):
        # More than a stream takes that nobody reads.
        rig.workers.chatter = [f"{number} {'x' * 2_000_000}" for number in range(50)]
        call = stub.AddGroup(pb.AddGroupRequest(group="new"))
        await until(lambda: rig.workers.began)
        await over(rig.changes)
        assert rig.serving == (["a", "new"], ["a", "new"])
        assert 0 < len(await lines_of(call)) < len(rig.workers.chatter)


async def test_callers_hear_that_the_server_shuts_down(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    async with rig_of("a") as rig, grpc.aio.insecure_channel(address_of(path)) as channel:
        async with serving(rig.changes, path):
            rig.workers.loading.clear()
            stub: Any = GroupsStub(channel)  # type: ignore[no-untyped-call]
            caller = asyncio.create_task(failure(stub.AddGroup(pb.AddGroupRequest(group="new"))))
            await until(lambda: rig.workers.began)
        assert (await caller).details() == "the server is shutting down"
        assert rig.serving == (["a"], ["a"])


# --- the socket


async def test_only_the_user_can_open_the_socket_and_it_goes_with_the_server(
    tmp_path: Path,
) -> None:
    path = socket_in(tmp_path)
    async with rig_of("a") as rig:
        async with serving(rig.changes, path):
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not path.parent.exists()


async def test_a_folder_that_was_there_or_is_anothers_too_stays(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    async with rig_of("a") as rig:
        async with serving(rig.changes, path):
            path.with_name("other.sock").touch()
        assert [left.name for left in path.parent.iterdir()] == ["other.sock"]
    path.with_name("other.sock").unlink()
    async with rig_of("a") as rig:
        async with serving(rig.changes, path):
            assert path.exists()
        assert path.parent.exists()


async def test_a_socket_that_is_left_over_is_replaced(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    path.parent.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    async with face_of(tmp_path, "a") as (_, stub):
        assert (await stub.ListGroups(pb.ListGroupsRequest())).groups[0].name == "a"


def open_to_others(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o755)


def a_link(path: Path) -> None:
    (path.parent.parent / "other").mkdir(0o700)
    path.parent.symlink_to(path.parent.parent / "other")


def a_file(path: Path) -> None:
    path.parent.touch()


def below_a_file(path: Path) -> None:
    path.parent.parent.rmdir()
    path.parent.parent.touch()


def a_file_in_the_way(path: Path) -> None:
    path.parent.mkdir(0o700)
    path.touch()


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (open_to_others, "is open to others; chmod 700 "),
        (a_link, "is not a folder"),
        (a_file, "is not a folder"),
        (below_a_file, "cannot make the folder "),
        (a_file_in_the_way, "is in the way, and is no socket"),
    ],
)
async def test_without_a_place_for_the_socket_the_server_goes_on(
    tmp_path: Path, prepare: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x" / "folder" / "3000.sock"
    path.parent.parent.mkdir()
    prepare(path)
    async with rig_of("a") as rig, offered(rig.changes, lambda: path):
        (warning,) = caplog.messages
        assert warning.startswith("groups cannot be changed while this server runs: ")
        assert told in warning


async def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(OSError, match="belongs to another user"):
        check_folder(tmp_path)


async def test_two_servers_do_not_share_a_socket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with face_of(tmp_path, "a") as (_, stub), rig_of("b") as other:
        async with offered(other.changes, lambda: socket_in(tmp_path)):
            assert "another server listens on" in caplog.messages[0]
        assert (await stub.ListGroups(pb.ListGroupsRequest())).groups[0].name == "a"


async def test_whoever_takes_the_socket_over_keeps_it(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    async with rig_of("a") as rig:
        async with serving(rig.changes, path):
            path.unlink()
            path.touch()
        assert path.exists()


async def test_the_face_that_is_offered_is_served_and_ended(tmp_path: Path) -> None:
    path = socket_in(tmp_path)
    async with rig_of("a") as rig:
        async with offered(rig.changes, lambda: path):
            assert path.exists()
        assert not path.exists()
