"""Ranks as processes: ``python -m shards``, one for each, driven over gRPC."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc

PATIENCE_S = 120.0
LINES_MAX = 10_000


class Rank:
    """One worker process of a group."""

    def __init__(self, arguments: Sequence[str], address: str) -> None:
        self.address = address
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shards", "--listen", address, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"},
        )
        self.lines: queue.Queue[str] = queue.Queue(LINES_MAX)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line.decode().rstrip())

    def ready(self) -> None:
        """Waits until the rank serves."""
        seen = []
        while True:
            try:
                seen.append(self.lines.get(timeout=PATIENCE_S))
            except queue.Empty as empty:
                raise AssertionError("\n".join(seen)) from empty
            event = json.loads(seen[-1])["event"] if seen[-1].startswith("{") else ""
            assert event != "error", "\n".join(seen)
            if event == "ready":
                return

    def heard(self) -> list[str]:
        """The lines that it has said since it was ready; it has ended."""
        self._reader.join(PATIENCE_S)
        return list(self.lines.queue)

    def end(self) -> None:
        """Ends it, whatever it does."""
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


class Group:
    """The ranks of one group, and a log of plans that all of them get."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks

    def run(self, *logs: Sequence[pb.Plan]) -> list[list[pb.Outcome]]:
        """The outcomes of each rank; all hear the same plans, or each one its own."""
        with ExitStack() as stack:
            streams = []
            for number, rank in enumerate(self.ranks):
                channel = stack.enter_context(grpc.insecure_channel(rank.address))
                stub = shard_pb2_grpc.ShardStub(channel)
                plans = logs[number % len(logs)]
                streams.append(stub.Run(iter(plans), timeout=PATIENCE_S))
            found: list[list[pb.Outcome]] = [[] for _ in self.ranks]
            readers = [
                threading.Thread(target=lambda n=n: found[n].extend(streams[n]))
                for n in range(len(streams))
            ]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(PATIENCE_S)
            return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def group(
    folder: Path, name: str, model: Path, world: int, options: Sequence[str] = ()
) -> Iterator[Group]:
    """A group that is ready; each rank gets further ``options``."""
    rendezvous = f"127.0.0.1:{free_port()}"
    common = ["--engine", "vllm", "--model", str(model), "--dtype", "float32"]
    common += ["--kv-tokens", "1024", "--sequences-max", "8", "--step-tokens-max", "128"]
    common += ["--engine-option", "eager=1", "--threads", "1", "--world", str(world)]
    common += options
    ranks = []
    try:
        for number in range(world):
            arguments = [*common, "--rank", str(number), "--rendezvous", rendezvous]
            ranks.append(Rank(arguments, f"unix://{folder}/{name}-{number}.sock"))
        for rank in ranks:
            rank.ready()
        yield Group(ranks)
    finally:
        for rank in ranks:
            rank.end()
