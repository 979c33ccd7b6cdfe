"""``router.v1.Groups``: who runs the server looks at its groups and changes them while it serves.

On a unix socket of its own, which nobody else can open; the public ports have nothing of it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from router.api.groups_socket import SOCKET_MODE, address_of, room_for
from router.api.grpc_calls import STREAM, UNARY, Context, Handler, Received, handler, opened
from router.api.grpc_errors import DOMAIN, abort_with, rich_status
from router.api.grpc_reflection import reflect
from router.change import ChangeError, Problem, Tell
from router.changing import Changes
from router.groups import State
from router.v1 import groups_pb2 as pb

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

SERVICE = "router.v1.Groups"
MESSAGE_BYTES_MAX = 2**16
"""A request: the description of one group."""
LINES_MAX = 256
"""Lines that may wait to be read; the oldest give way."""
READ_S = 10.0
"""What the reader of a call whose change has ended may take for the last lines."""
STOP_S = 3.0

_CODES = {
    Problem.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Problem.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Problem.IMPOSSIBLE: grpc.StatusCode.FAILED_PRECONDITION,
}
_STATES = {
    "down": pb.GROUP_STATE_DOWN,
    "up": pb.GROUP_STATE_UP,
    "leaving": pb.GROUP_STATE_LEAVING,
}


class Lines:
    """What a change says and its caller has not read yet. ``tell`` never waits."""

    def __init__(self) -> None:
        self._waiting = deque[pb.Progress](maxlen=LINES_MAX)
        self._news = asyncio.Event()
        self._ended = False

    def tell(self, line: str, loaded: float) -> None:
        """One line more, and how far the workers are; the same one once more only says how far."""
        if self._waiting and self._waiting[-1].line == line:
            self._waiting.pop()
        self._waiting.append(pb.Progress(line=line, loaded=loaded))
        self._news.set()

    def end(self) -> None:
        """There will be no more."""
        self._ended = True
        self._news.set()

    async def read(self) -> AsyncIterator[pb.Progress]:
        """Every line, until the last."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                yield self._waiting.popleft()
            if self._ended:
                return


class GroupsService:
    """The methods of ``router.v1.Groups``."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def handlers(self) -> dict[str, Handler]:
        """The methods by name."""
        progress = pb.Progress
        return {
            "ListGroups": handler(
                UNARY, self.list_groups, pb.ListGroupsRequest, pb.ListGroupsResponse
            ),
            "AddGroup": handler(STREAM, self.add_group, pb.AddGroupRequest, progress),
            "RemoveGroup": handler(STREAM, self.remove_group, pb.RemoveGroupRequest, progress),
            "SwitchGroups": handler(STREAM, self.switch_groups, pb.SwitchGroupsRequest, progress),
        }

    async def list_groups(
        self, request: Received[pb.ListGroupsRequest], context: Context
    ) -> pb.ListGroupsResponse:
        """Every group."""
        async with opened(request, context):
            groups = map(_status, self._changes.states())
            return pb.ListGroupsResponse(groups=groups, waiting=self._changes.waiting)
        raise AssertionError("either returned or aborted")

    async def add_group(self, request: Received[pb.AddGroupRequest], context: Context) -> None:
        """Starts a group."""
        async with _changing(request, context) as known:
            await _follow(context, lambda tell: self._changes.add(known.group, known.limit_s, tell))

    async def remove_group(
        self, request: Received[pb.RemoveGroupRequest], context: Context
    ) -> None:
        """Takes a group away."""
        async with _changing(request, context) as known:
            await _follow(
                context, lambda tell: self._changes.remove(known.name, known.limit_s, tell)
            )

    async def switch_groups(
        self, request: Received[pb.SwitchGroupsRequest], context: Context
    ) -> None:
        """Puts a group in the place of others."""
        async with _changing(request, context) as known:
            await _follow(
                context,
                lambda tell: self._changes.switch(
                    known.group, known.stop_first, known.limit_s, tell
                ),
            )


@asynccontextmanager
async def _changing(request: Received[M], context: Context) -> AsyncIterator[M]:
    """Yields the request; a change that fails becomes the status of the call."""
    async with opened(request, context) as known:
        try:
            yield known
        except ChangeError as error:
            code = _CODES[error.problem]
            reason = error_details_pb2.ErrorInfo(
                reason=f"GROUP_{error.problem.name}", domain=DOMAIN
            )
            await abort_with(context, code, rich_status(code, str(error), [reason]))


async def _follow(context: Context, change: Callable[[Tell], Coroutine[Any, Any, None]]) -> None:
    """Makes a change and passes on what it says. Whoever reads slowly, or has left, holds up none.

    Raises what the change raises.
    """
    lines = Lines()
    making = asyncio.ensure_future(change(lines.tell))
    writing = asyncio.ensure_future(_write(lines, context))
    try:
        await asyncio.wait((making,))
        lines.end()
        await asyncio.wait((writing,), timeout=READ_S)
    finally:
        making.cancel()
        writing.cancel()
        await asyncio.wait((making, writing))
    making.result()


async def _write(lines: Lines, context: Context) -> None:
    """Writes all lines, for as long as there is somebody to read them."""
    try:
        async for line in lines.read():
            await context.write(line)
    except grpc.aio.BaseError:
        log.debug("the caller of a change has left")


def _status(state: State) -> pb.GroupStatus:
    """How a group is, as a message."""
    status = pb.GroupStatus(
        name=state.spec.name,
        state=_STATES[state.state],
        model=state.spec.model or "",
        addresses=state.spec.addresses,
        running=state.running,
        kv_tokens=state.kv_tokens,
        kv_used=state.kv_used,
        kv_cached=state.kv_cached,
    )
    if (card := state.card) is not None:
        status.model, status.engine = card.model, card.engine
        status.engine_version, status.device = card.engine_version, card.device
    return status


@asynccontextmanager
async def serving(changes: Changes, path: Path) -> AsyncIterator[None]:
    """Serves on a socket while inside. Raises ``OSError`` with one line if it cannot be had."""
    with room_for(path):
        server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.so_reuseport", 0),
            )
        )
        await _fill(server, changes)
        _bind(server, path)
        await server.start()
        with _removed(path):
            try:
                yield
            finally:
                await changes.close()
                await server.stop(STOP_S)


def _bind(server: grpc.aio.Server, path: Path) -> None:
    try:
        server.add_insecure_port(address_of(path))
        path.chmod(SOCKET_MODE)
    except (RuntimeError, OSError) as error:
        raise OSError(f"cannot listen on {path}") from error


async def _fill(server: grpc.aio.Server, changes: Changes) -> None:
    """The service, health and reflection."""
    handlers = GroupsService(changes).handlers()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflect(names, server)


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """Removes the socket at the end, unless it is another's by then."""
    made = path.lstat().st_ino
    try:
        yield
    finally:
        try:
            if path.lstat().st_ino == made:
                path.unlink()
        except OSError:
            log.debug("%s has gone", path)


@asynccontextmanager
async def offered(changes: Changes, place: Callable[[], Path]) -> AsyncIterator[None]:
    """As ``serving``; if the socket cannot be had, that is a warning, and the server goes on."""
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(serving(changes, place()))
        except OSError as error:
            log.warning("groups cannot be changed while this server runs: %s", error)
        yield
