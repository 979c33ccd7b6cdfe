"""Asks a running server of its groups, and for other ones; what ``roundhouse groups`` does."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeAlias

import click
import grpc

from deploy.control import FOLDER, find_socket
from deploy.options import UserError
from deploy.patience import QUIET_S
from router.api.groups_socket import address_of, check_folder
from router.v1 import groups_pb2 as pb
from router.v1.groups_pb2_grpc import GroupsStub

TICK_S = 0.25
# How often one hears how far it is, when that alone has changed.
LOADING_LINE_S = 5.0
ANSWER_S = 10.0
INTERRUPTED = 130
STATES = {
    pb.GROUP_STATE_DOWN: "down",
    pb.GROUP_STATE_UP: "up",
    pb.GROUP_STATE_LEAVING: "leaving",
}

Call: TypeAlias = "Callable[[GroupsStub], Iterator[pb.Progress]]"


@contextmanager
def server_on(port: int) -> Iterator[GroupsStub]:
    """The server on this port of REST. Raises ``UserError`` for whatever it answers but success."""
    nobody = (
        f"there is no server on port {port} that could be asked, or it is not ready yet: say which "
        f"by --port (a gateway has no groups: its router has them); if it has another {FOLDER}, or "
        f"another folder for temporary files, set {FOLDER} for both"
    )
    try:
        path = find_socket(port)
        check_folder(path.parent)
    except FileNotFoundError:
        raise UserError(nobody) from None
    except OSError as error:
        raise UserError(str(error)) from error
    if not os.path.lexists(path):
        raise UserError(nobody)
    with grpc.insecure_channel(address_of(path), (("grpc.enable_http_proxy", 0),)) as channel:
        try:
            yield GroupsStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise UserError(_told(error, port)) from error


def _told(error: grpc.RpcError, port: int) -> str:
    """What an answer that is none means, in one line."""
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE:
        if "failed to connect" in details:
            return f"the server on port {port} has ended, or takes no changes: see its log"
        return f"the server on port {port} has ended meanwhile"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"the server on port {port} has not answered within {ANSWER_S:g} s"
    return details or code.name


def list_groups(port: int) -> pb.ListGroupsResponse:
    """All groups of the server on this port. Raises ``UserError``."""
    with server_on(port) as server:
        answer: pb.ListGroupsResponse = server.ListGroups(pb.ListGroupsRequest(), timeout=ANSWER_S)
    return answer


def change(port: int, call: Call, interrupted: str) -> str:
    """Makes a change, and shows how it goes if that takes a while; returns what has been done.

    ``interrupted`` is what is said after a Ctrl-C. Raises ``UserError``.
    """
    with server_on(port) as server, Shown() as shown:
        stream: Any = None
        last = ""
        try:
            stream = call(server)
            for progress in stream:
                last = progress.line
                shown.tell(progress.line, progress.loaded)
        except KeyboardInterrupt:
            if stream is not None:
                stream.cancel()
            shown.close()
            click.echo(f"interrupted: {interrupted}", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
    return last


class Shown:
    """Shows on standard error what is being done now, from two seconds on."""

    def __init__(self) -> None:
        self._line, self._loaded = "", 0.0
        self._shown, self._shown_s = ("", 0.0), 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def tell(self, line: str, loaded: float) -> None:
        """This is what is being done, and how far the workers have loaded: 0 to 1."""
        self._line, self._loaded = line, loaded

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Shows nothing any more."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = QUIET_S
        while not self._end.wait(wait_s):
            self._show(self._line, self._loaded)
            wait_s = TICK_S

    def _show(self, line: str, loaded: float) -> None:
        """A line that is new; or the same one, if it has come further, every few seconds."""
        again = line == self._shown[0]
        due = not again or (
            loaded != self._shown[1] and monotonic() - self._shown_s >= LOADING_LINE_S
        )
        if line and due:
            self._shown, self._shown_s = (line, loaded), monotonic()
            print(f"{line}, {loaded:.0%}" if 0 < loaded < 1 else line, file=sys.stderr, flush=True)


def as_dict(answer: pb.ListGroupsResponse) -> dict[str, Any]:
    """The groups as JSON has them."""
    return {"groups": [_group(group) for group in answer.groups], "waiting": answer.waiting}


def _group(group: pb.GroupStatus) -> dict[str, Any]:
    return {
        "name": group.name,
        "state": STATES.get(group.state, "unknown"),
        "model": group.model,
        "engine": group.engine,
        "engine_version": group.engine_version,
        "device": group.device,
        "addresses": list(group.addresses),
        "running": group.running,
        "kv_tokens": group.kv_tokens,
        "kv_used": group.kv_used,
        "kv_cached": group.kv_cached,
    }


def table(answer: pb.ListGroupsResponse) -> list[str]:
    """The groups for people: one row each, below it where its workers are if that is elsewhere."""
    heads = (
        "group",
        "state",
        "model",
        "engine",
        "device",
        "running",
        "KV used",
        "KV kept",
        "KV tokens",
    )
    rows = [heads, *map(_row, answer.groups)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for group, row in zip((None, *answer.groups), rows, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if group is not None and not all(one.startswith("unix:") for one in group.addresses):
            lines.append(f"  at {', '.join(group.addresses)}")
    if answer.waiting:
        lines += ["", f"requests that wait for a place: {answer.waiting}"]
    return lines


def _row(group: pb.GroupStatus) -> tuple[str, ...]:
    named = (group.model, group.engine, group.device)
    counts = (group.running, group.kv_used, group.kv_cached, group.kv_tokens)
    texts = (text or "-" for text in named)
    return (group.name, STATES.get(group.state, "unknown"), *texts, *(f"{one:,}" for one in counts))
