"""A worker process of a supervisor: how it is ended while a router has a stream open there."""

import asyncio
import sys
from pathlib import Path

import grpc.aio
import pytest

from deploy.processes import WorkerProcess
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc

DEADLINE_S = 20.0


async def read_on(stream: grpc.aio.StreamStreamCall[pb.Plan, pb.Outcome]) -> None:
    """Reads to the stream's end."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_one_that_is_ended_does_not_wait_for_its_router(tmp_path: Path) -> None:
    """It is asked by a signal, too, which alone would let it wait."""
    address = f"unix://{tmp_path}/worker.sock"
    said: list[str] = []
    ready = asyncio.Event()

    def hear(line: str) -> None:
        said.append(line)
        if '"ready"' in line:
            ready.set()

    command = (sys.executable, "-m", "shards", "--engine", "scripted", "--listen", address)
    async with asyncio.timeout(DEADLINE_S):
        process = await WorkerProcess.start((*command, "--exit-with-parent"), None, hear)
        try:
            await ready.wait()
            async with grpc.aio.insecure_channel(address) as channel:
                stream = shard_pb2_grpc.ShardStub(channel).Run()
                await stream.write(pb.Plan(epoch=1, plan_id=1))
                assert (await stream.read()).plan_id == 1
                await process.end(2 * DEADLINE_S)
                with pytest.raises(grpc.aio.AioRpcError, match="the worker is stopping"):
                    await read_on(stream)
        finally:
            process.kill()
        assert await process.ended() == 0, said
