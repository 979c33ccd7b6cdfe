"""The ranks of one group find each other here, and notice when one of them is gone.

Ranks meet in collective operations, and one that waits for a dead one may wait for ever: vLLM's CPU
build, for one, spins on shared memory, where nobody can be missed. So the ranks also hold plain TCP
connections: rank 0 listens at the group's rendezvous, the others connect to it. The connection of a
process that ends, however it ends, is closed by its kernel; of a host that is gone, by the
keep-alive. Whoever sees that ends its own process: the thread that waits cannot be helped.

The first thing said on it is where the engine's own store is to listen: a port that rank 0 found
free, new for each life of a group, as the names that are derived from it must be.
"""

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

JOIN_S = 180.0
RETRY_S = 0.05
# A host that does not answer is given up after about 4 s.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 1, 1, 3
CLOSE_S = 1.0
LINE_MAX = 64
# The last byte of a rank that leaves in order.
GOODBYE = b"."


class PeersError(Exception):
    """The ranks did not find each other. The text is one line."""


class Peers:
    """The connections of one rank: rank 0 has one to each other rank, these have one to rank 0.

    ``store_port`` is the port for the engine's own rendezvous, on rank 0's host.
    """

    def __init__(self, rank: int, world: int, rendezvous: str, timeout_s: float = JOIN_S) -> None:
        self._until = time.monotonic() + timeout_s
        self._name = f"rank {rank} of {world} at {rendezvous}"
        host, _, port = rendezvous.rpartition(":")
        address = (host.strip("[]"), int(port))
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._sockets: dict[int, socket.socket] = {}
        try:
            if rank == 0:
                self._gather(address, world)
                self.store_port = _free_port(address[0])
                for peer in self._sockets.values():
                    peer.sendall(f"{self.store_port}\n".encode())
            else:
                joined = self._sockets[0] = self._join(address)
                joined.sendall(f"{rank}/{world}\n".encode())
                self.store_port = int(self._line(joined))
        except (OSError, ValueError, PeersError) as error:
            self.close()
            if isinstance(error, PeersError):
                raise
            raise PeersError(f"{self._name}: a rank went before all were there") from error
        for peer in self._sockets.values():
            peer.settimeout(None)

    def watch(self, lost: Callable[[str], None]) -> None:
        """Starts the thread that calls ``lost`` once, with one line, when a rank is gone."""
        self._thread = threading.Thread(target=self._watch, args=(lost,), name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves in order: the others are not alarmed."""
        self._closing.set()
        for peer in self._sockets.values():
            with suppress(OSError):
                peer.sendall(GOODBYE)
                peer.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        for peer in self._sockets.values():
            peer.close()

    # Meeting ------------------------------------------------------------------------------------

    def _gather(self, address: tuple[str, int], world: int) -> None:
        """Rank 0: takes the connections of all others in."""
        try:
            server = socket.create_server(address, backlog=world)
        except OSError as error:
            raise PeersError(f"{self._name}: cannot listen: {error.strerror}") from error
        with server:
            while len(self._sockets) < world - 1:
                peer = self._accept(server, world)
                with suppress(PeersError, ValueError):
                    # Whoever is no rank of this group is let go, and the port stays open for those.
                    rank, _, its_world = self._line(peer).partition("/")
                    if int(its_world) == world and 0 < int(rank) < world:
                        _keep_alive(peer)
                        self._sockets[int(rank)] = peer
                        continue
                peer.close()

    def _accept(self, server: socket.socket, world: int) -> socket.socket:
        server.settimeout(max(0.0, self._until - time.monotonic()))
        try:
            return server.accept()[0]
        except (TimeoutError, BlockingIOError) as error:
            missing = sorted(set(range(1, world)) - set(self._sockets))
            raise PeersError(f"{self._name}: rank {missing[0]} did not come in time") from error

    def _join(self, address: tuple[str, int]) -> socket.socket:
        """Other ranks: connect as soon as rank 0 listens."""
        while True:
            left_s = self._until - time.monotonic()
            try:
                peer = socket.create_connection(address, timeout=max(RETRY_S, left_s))
            except OSError as error:
                if left_s <= 0.0:
                    raise PeersError(f"{self._name}: rank 0 did not come in time") from error
                time.sleep(RETRY_S)
                continue
            _keep_alive(peer)
            return peer

    def _line(self, peer: socket.socket) -> str:
        """The first line that a peer sends. Raises ``PeersError``."""
        said = b""
        try:
            while not said.endswith(b"\n"):
                peer.settimeout(max(RETRY_S, self._until - time.monotonic()))
                byte = peer.recv(1)
                if not byte or len(said) > LINE_MAX:
                    raise PeersError(f"{self._name}: what is at the other end is no rank of it")
                said += byte
        except OSError as error:
            raise PeersError(f"{self._name}: a rank went before all were there") from error
        return said.decode(errors="replace").strip()

    # Watching -----------------------------------------------------------------------------------

    def _watch(self, lost: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._sockets.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    if self._gone(key.fileobj) and not self._closing.is_set():
                        lost(f"{self._name}: rank {key.data} is gone")
                        return
                    selector.unregister(key.fileobj)

    @staticmethod
    def _gone(peer: object) -> bool:
        """Whether a connection that has something to read ended without a goodbye."""
        assert isinstance(peer, socket.socket)
        try:
            return peer.recv(1) != GOODBYE
        except OSError:
            return True


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
    ):
        if hasattr(socket, name):  # not every system has all of them
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
