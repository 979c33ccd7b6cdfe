"""The network side of one process: where REST and gRPC are started and stopped, and signals."""

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc.aio
import uvicorn
from starlette.types import ASGIApp

from router.api.gateway_server import Gateways
from router.api.grpc_server import start as start_grpc
from router.api.grpc_server import start_for_gateways
from router.api.rest.app import create_app
from router.config import Settings
from router.connections import Connection
from router.fleet import Fleet
from router.https import server_context
from router.identities import Identities
from router.metrics import Metrics
from router.service import Service
from router.tracing import OFF, Tracing
from tls.identity import Identity

BACKLOG = 4096
"""Connections that may wait to be accepted: a thousand clients may arrive at once."""

KEEP_ALIVE_S = 75
"""Longer than the 60 s after which common load balancers close an idle connection themselves: the
side that closes first must be the client's, or a request may cross with the closing."""

STALLED_MS = 300_000
"""How long a client may read nothing of what it is sent, before the system ends its connection."""

FILES_MAX = 65_536
"""Open files that are asked for: more streams than one process can serve."""

FLUSH_S = 3.0
"""What closed answers may take to be written out to their clients."""


def ending_signals() -> tuple[signal.Signals, ...]:
    """What asks for an orderly end: SIGHUP too, but not where ``nohup`` has it ignored."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


class Signals:
    """Signals counted: ``first`` asks for an orderly end, ``second`` for a quick one.

    A third one has its usual effect. A terminal that closes is told by the system and by a shell:
    SIGHUP is never a second one. Use as a context manager in the main thread.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._numbers = ending_signals()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.add_signal_handler(number, self._caught, number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.remove_signal_handler(number)

    def _caught(self, number: signal.Signals) -> None:
        if self.first.is_set() and number == signal.SIGHUP:
            return
        if self.first.is_set():
            self.second.set()
            self._let_go()
        self.first.set()


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work unless the event happens first; says whether the work was done."""
    job, stop = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((job, stop), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            await job
        return job.done()
    finally:
        for task in (job, stop):
            task.cancel()
        await asyncio.wait((job, stop))


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the program that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RestFace:
    """The REST server of an application, on listening sockets. ``run`` is its task.

    ``port`` is that of the first socket. Without an identity nothing is encrypted.
    """

    def __init__(
        self, app: ASGIApp, *listeners: socket.socket, identity: Identity | None = None
    ) -> None:
        self.port: int = listeners[0].getsockname()[1]
        self._listeners = list(listeners)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        config.ssl = server_context(identity) if identity is not None else None
        self._server = _Uvicorn(config)

    async def run(self) -> None:
        """Serves until the intake is stopped and every answer is written out."""
        try:
            await self._server.serve(sockets=self._listeners)
        finally:  # the server closes them itself unless it is cancelled
            for listening in (*getattr(self._server, "servers", ()), *self._listeners):
                listening.close()
        if not self._server.should_exit:
            raise RuntimeError("the REST server ended by itself")

    def stop_intake(self) -> None:
        """Takes no more connections; those that are open may get their answers."""
        self._server.should_exit = True

    def close(self) -> None:
        """Gives answers that have ended a moment to be written out; then ``run`` ends."""
        self.stop_intake()
        asyncio.get_running_loop().call_later(FLUSH_S, self._force)

    def _force(self) -> None:
        self._server.force_exit = True


class Faces:
    """The REST and gRPC servers. ``run`` is the task of REST; gRPC has its own within grpcio."""

    def __init__(
        self,
        rest: RestFace,
        rpc: grpc.aio.Server,
        grpc_port: int,
        gateways: Gateways | None,
        cluster: grpc.aio.Server | None,
    ) -> None:
        self.port = rest.port
        self.grpc_port = grpc_port
        self._rest = rest
        self._rpc = rpc
        self._cluster = cluster
        self._gateways = gateways

    @classmethod
    async def start(
        cls,
        service: Service,
        fleet: Fleet,
        metrics: Metrics,
        settings: Settings,
        gateways: Gateways | None = None,
        identities: Identities | None = None,
        *,
        tracing: Tracing = OFF,
    ) -> "Faces":
        """Binds the ports and starts gRPC. Raises ``OSError`` with one line if one is taken.

        ``gateways`` serves the processes that run REST faces elsewhere, if there may be any.
        ``identities`` are those of the settings, if they have been read already; ``tracing`` is
        told of calls.
        """
        shown = identities or Identities.of(settings)
        listener = listen(settings.host, settings.port)
        try:
            if settings.grpc_port == 0:
                settings = replace(settings, grpc_port=_free_port(settings.host))
            rpc = await start_grpc(
                service,
                fleet,
                settings,
                gateways=gateways,
                models=metrics.models,
                identities=shown,
                tracing=tracing,
            )
            cluster = await _for_cluster(gateways, settings, shown, rpc)
        except BaseException:
            listener.close()
            raise
        app = create_app(service, fleet, metrics, settings, tracing)
        rest = RestFace(app, listener, identity=shown.clients)
        return cls(rest, rpc, settings.grpc_port, gateways, cluster)

    async def run(self) -> None:
        """Serves REST until the intake is stopped and every answer is written out."""
        await self._rest.run()

    def stop_intake(self) -> None:
        """Takes no more connections; those that are open may get their answers.

        A gRPC call that still arrives is refused by the driver, and told to try elsewhere.
        """
        self._rest.stop_intake()
        if self._gateways is not None:
            self._gateways.close()

    async def close(self) -> None:
        """Gives answers that have ended a moment to be written out, then closes everything."""
        self.stop_intake()
        self._rest.close()
        servers = filter(None, (self._rpc, self._cluster))
        await asyncio.gather(*(server.stop(FLUSH_S) for server in servers))


async def _for_cluster(
    gateways: Gateways | None, settings: Settings, shown: Identities, beside: grpc.aio.Server
) -> grpc.aio.Server | None:
    """The server of the cluster's port, if there is one. If it cannot start, nor does the other."""
    port, cluster = settings.cluster_port, shown.cluster
    if gateways is None or port is None or cluster is None:
        return None
    try:
        return await start_for_gateways(gateways, settings, port, cluster)
    except BaseException:
        await beside.stop(None)
        raise


def raise_file_limit() -> None:
    """Allows as many connections as the system lets this process have, up to ``FILES_MAX``.

    Shells and services begin with 1,024 open files, for the sake of programs that use ``select``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def settle_memory() -> None:
    """Spares the collector what stays for good: a full pass over it would pause every stream."""
    gc.collect()
    gc.freeze()


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A listening TCP socket; ``host`` is an IPv4 or IPv6 address or a name.

    With ``reuse_port`` other sockets made so, by the same user, may listen there, too; the system
    gives each new connection to one of them. Raises ``OSError`` with one line.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        dual = family is socket.AddressFamily.AF_INET6 and socket.has_dualstack_ipv6()
        listening = socket.create_server(
            address[:2],
            family=family,
            backlog=BACKLOG,
            reuse_port=reuse_port,
            dualstack_ipv6=dual and host == "::",
        )
    except OSError as error:
        cause = str(error.strerror or error).split(" (", 1)[0]  # the address is said already
        raise OSError(f"cannot listen on {host}:{port}: {cause}") from error
    if sys.platform == "linux":  # connections inherit it; other systems have a limit of their own
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
    return listening


def _free_port(host: str) -> int:
    """A TCP port that nobody listens on now."""
    with listen(host, 0) as probe:
        port: int = probe.getsockname()[1]
        return port
