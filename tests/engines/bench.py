"""A worker with the scripted engine, and a client of it, over a unix socket."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shards import engines
from shards.engines.base import Engine, EngineOptions
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc
from shards.worker import SERVICE, Worker

# For what must happen at once; a test that waits so long has failed.
PATIENCE_S = 20.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def scripted(rank: int = 0, **extra: object) -> Callable[[], Engine]:
    pairs = tuple((key, str(value)) for key, value in extra.items())
    options = EngineOptions(None, "m", 4096, 8, 256, rank=rank, world=rank + 1, extra=pairs)
    return lambda: engines.load("scripted", options, lambda _fraction: None)


class Client:
    """A worker and a channel to it."""

    def __init__(self, worker: Worker, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self.channel = channel
        self.stub = shard_pb2_grpc.ShardStub(channel)

    async def health(self) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        return answer.status

    async def fault(self, stream: grpc.aio.StreamStreamCall) -> tuple[grpc.StatusCode, str]:
        """Reads on until the stream ends; how it ended."""
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError("the stream ended without a fault")


@asynccontextmanager
async def serving(folder: Path, make: Callable[[], Engine]) -> AsyncIterator[Client]:
    async with asyncio.timeout(PATIENCE_S):
        worker = Worker(make, f"unix://{folder}/worker.sock")
        await worker.start()
        try:
            await worker.ready()
            async with grpc.aio.insecure_channel(worker.address) as channel:
                yield Client(worker, channel)
        finally:
            await worker.stop()


def first_plan(*sequences: int, epoch: int = 1, **fields: object) -> pb.Plan:
    """Admits sequences with three tokens each, and computes them."""
    return pb.Plan(
        epoch=epoch,
        plan_id=1,
        admits=[pb.Admit(sequence=n, tokens=[n, 2, 3], prompt_len=3, **fields) for n in sequences],
        work_sequences=sequences,
        work_tokens=[3] * len(sequences),
    )


def next_plan(plan_id: int, *sequences: int, epoch: int = 1) -> pb.Plan:
    return pb.Plan(
        epoch=epoch, plan_id=plan_id, work_sequences=sequences, work_tokens=[1] * len(sequences)
    )
