"""Router and workers on this machine, as one command: what ``roundhouse serve`` runs."""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing
from pathlib import Path

from deploy.console import Console, Urls
from deploy.control import SOCKET_PATH_MAX, control_socket
from deploy.folders import PREFIX, SUFFIX, folder_for_run
from deploy.further import FurtherGroups
from deploy.groups import LocalGroup
from deploy.live import LocalWorkers
from deploy.ranks import first_ranks, group_spec
from deploy.supervisor import Supervisor
from router import app, tracing
from router.api.groups_face import offered
from router.change import Workers
from router.changing import Changes
from router.config import GroupSpec, Settings
from router.faces import ending_signals
from router.remote_workers import RemoteWorkers

OnReady = Callable[[int, int], None]
"""Called with the ports of REST and gRPC."""


def socket_folder() -> AbstractContextManager[Path]:
    """A new folder for this run, with a path short enough for sockets."""
    longest = Path(tempfile.gettempdir()) / f"{PREFIX}12345678{SUFFIX}" / "999-9999.sock"
    short = "/tmp"  # noqa: S108 - what is made in it is new, and its user's alone
    return folder_for_run(short if len(os.fsencode(longest)) > SOCKET_PATH_MAX else "")


def check_ports(settings: Settings) -> None:
    """Raises ``OSError`` if a port cannot be had; loading a model takes longer than this."""
    ports = {
        "--port": settings.port,
        "--grpc-port": settings.grpc_port,
        "--cluster-port": settings.cluster_port or 0,
    }
    for option, port in ports.items():
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                probe.listen()
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"cannot listen on {settings.host}:{port}: {reason}; "
                f"choose another port with {option}, or another address with --hostname"
            ) from error


async def serve(
    settings: Settings, groups: Sequence[LocalGroup], further: FurtherGroups, console: Console
) -> None:
    """Serves one model, by all groups, until a signal to end has been obeyed.

    The router begins when the workers have loaded: its ports are closed until it reaches one.
    ``further`` makes the groups that are asked for from then on.
    Raises ``StartError`` if a worker cannot start, ``OSError`` if a port cannot be had,
    ``CancelledError`` on a signal while loading.
    """
    check_ports(settings)
    tracing.check(settings)
    with closing(console), socket_folder() as folder:
        ranks = first_ranks(groups, folder)
        specs = [group_spec(group, ranks[group.name]) for group in groups]
        supervisor = Supervisor(ranks, console.tell)
        workers = LocalWorkers(supervisor, groups, further, folder, console)
        on_ready = _announcer(settings, groups[0].model.model_id, console)
        changes = controlled(lambda _: workers)
        try:
            await _together(settings, specs, supervisor, on_ready, changes, console.stopping)
        except OSError:
            check_ports(settings)  # taken while the model was loaded, one is told with its option
            raise


async def route(settings: Settings, groups: tuple[GroupSpec, ...], console: Console) -> None:
    """Serves the models of workers elsewhere until a signal to end has been obeyed."""
    check_ports(settings)
    changes = controlled(lambda router: RemoteWorkers(len(groups), router.identities.cluster))
    on_ready = _announcer(settings, "", console)
    await app.serve(settings, groups, on_ready, changes=changes, on_stopping=console.stopping)


def controlled(workers_of: Callable[[app.Router], Workers]) -> app.MakeChanges:
    """Lets whoever runs the server change its groups, whose workers are to be had from these."""

    @asynccontextmanager
    async def change(router: app.Router, port: int) -> AsyncIterator[Callable[[], None]]:
        limit_s = router.settings.graceful_termination_timeout_s
        changes = Changes(router.groups, workers_of(router), router.own, limit_s)
        async with offered(changes, lambda: control_socket(port)):
            yield changes.take_no_more

    return change


def _announcer(settings: Settings, model_id: str, console: Console) -> OnReady:
    """What to do once the router serves on these two ports."""
    tls, certificate = settings.tls is not None, bool(settings.tls_client_ca)
    return lambda port, grpc_port: console.ready(
        Urls.of(settings.host, port, grpc_port, tls=tls),
        model_id,
        settings.api_key,
        certificate=certificate,
    )


async def _together(
    settings: Settings,
    groups: Sequence[GroupSpec],
    supervisor: Supervisor,
    on_ready: OnReady,
    changes: app.MakeChanges,
    on_stopping: Callable[[], None],
) -> None:
    """Runs the router beside the supervisor; either one's failure ends both."""

    def silent(group: str) -> None:
        supervisor.replace(group, "it hung, and was killed")

    this = asyncio.current_task()
    assert this is not None, "a coroutine runs in a task"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.TaskGroup() as tasks:
            keeper = tasks.create_task(supervisor.run())
            # The router's own handlers take over when it begins. Ctrl-C is Python's until then.
            for number in ending_signals():
                if number != signal.SIGINT:
                    loop.add_signal_handler(number, this.cancel)
            await supervisor.all_ready()
            await app.serve(
                settings,
                groups,
                on_ready,
                open_when_ready=True,
                silent=silent,
                changes=changes,
                on_stopping=on_stopping,
            )
            keeper.cancel()
    except ExceptionGroup as failures:
        # One failure cancels the other task, so there is one to tell of.
        raise failures.exceptions[0] from None
