"""How ranks meet and miss each other: real sockets, real processes."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shards.engines.peers import Peers, PeersError
from shards.engines.vllm_segments import sweep
from tests.heavy.vllm.worker_processes import free_port

SOON_S = 5.0


def meet(world: int) -> list[Peers]:
    rendezvous = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: Peers(rank, world, rendezvous, SOON_S), range(world)))


class Ear:
    """Hears of one loss."""

    def __init__(self) -> None:
        self.said = ""
        self.heard = threading.Event()

    def __call__(self, reason: str) -> None:
        self.said = reason
        self.heard.set()


def test_all_ranks_learn_one_port_that_is_free() -> None:
    ranks = meet(3)
    (port,) = {rank.store_port for rank in ranks}
    with socket.create_server(("127.0.0.1", port)):
        pass
    for rank in ranks:
        rank.close()


def test_who_leaves_in_order_alarms_nobody() -> None:
    ranks, ears = meet(3), [Ear(), Ear(), Ear()]
    for rank, ear in zip(ranks, ears, strict=True):
        rank.watch(ear)
    for rank in ranks:
        rank.close()
    # Each thread ends once it has heard every goodbye.
    until = time.monotonic() + SOON_S
    while any(thread.name == "peers" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not any(ear.heard.is_set() for ear in ears)


CHILD = """
import sys, time
from shards.engines.peers import Peers
peers = Peers(int(sys.argv[1]), 2, sys.argv[2])
print("met", flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[object]:
    started: list[subprocess.Popen[bytes]] = []

    def start(rank: int, rendezvous: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", CHILD, str(rank), rendezvous]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_missed_at_once(child, rank: int) -> None:
    rendezvous = f"127.0.0.1:{free_port()}"
    process = child(rank, rendezvous)
    peers, ear = Peers(1 - rank, 2, rendezvous, SOON_S), Ear()
    peers.watch(ear)
    assert process.stdout.readline() == b"met\n"
    assert not ear.heard.is_set()
    process.kill()
    assert ear.heard.wait(SOON_S)
    assert ear.said == f"rank {1 - rank} of 2 at {rendezvous}: rank {rank} is gone"
    peers.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    rendezvous = f"127.0.0.1:{free_port()}"
    with pytest.raises(PeersError, match="rank 1 did not come in time"):
        Peers(0, 2, rendezvous, 0.2)
    with pytest.raises(PeersError, match="rank 0 did not come in time"):
        Peers(1, 2, rendezvous, 0.2)


def test_strangers_are_turned_away() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Peers, 0, 2, f"127.0.0.1:{port}", SOON_S)
        until = time.monotonic() + SOON_S
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                assert time.monotonic() < until
        with stranger:
            stranger.sendall(b"GET / HTTP/1.1\n")
            second = pool.submit(Peers, 1, 2, f"127.0.0.1:{port}", SOON_S)
            assert first.result(SOON_S).store_port == second.result(SOON_S).store_port
            assert stranger.recv(1) == b""
        first.result().close()
        second.result().close()


def test_only_what_dead_groups_left_is_swept(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as living:
        alive, dead = living.getsockname()[1], free_port()
        names = {
            "alive": f"{alive}-tp:0-[0-1]-cpushm_0",
            "dead": f"{dead}-tp:0-[0-1]-cpushm_1",
            "foreign": "psm_1234",
            "unnamed": "__-tp:0-[0-1]-cpushm_0",
        }
        for name in names.values():
            (tmp_path / name).touch()
        sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {name for kind, name in names.items() if kind != "dead"}
