"""A worker that is told to leave: what its open stream, others that call, and health then hear."""

import asyncio
import threading
from collections.abc import Awaitable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from shards.engines.base import Engine, EngineOptions, Outcome, Plan
from shards.v1 import shard_pb2 as pb
from shards.worker import Worker
from tests.engines.bench import (
    NOT_SERVING,
    PATIENCE_S,
    Client,
    first_plan,
    next_plan,
    scripted,
    serving,
)
from tests.engines.skilled import SkilledEngine

Stream = grpc.aio.StreamStreamCall[pb.Plan, pb.Outcome]
LEAVING = (grpc.StatusCode.UNAVAILABLE, "the worker is leaving")
STOPPING = (grpc.StatusCode.UNAVAILABLE, "the worker is stopping")


async def heard_leaving(stream: Stream, epoch: int) -> None:
    """The stream's next message is that the worker leaves, and nothing else."""
    assert await stream.read() == pb.Outcome(epoch=epoch, leaving=True)


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def gated(gate: threading.Event) -> Engine:
    """An engine that waits at its gate before it is empty, and before each step."""
    engine = scripted()()
    reset, step = engine.reset, engine.step

    def waits_reset() -> None:
        gate.wait(PATIENCE_S)
        reset()

    def waits_step(plan: Plan) -> Outcome:
        gate.wait(PATIENCE_S)
        return step(plan)

    engine.reset = waits_reset  # type: ignore[method-assign]
    engine.step = waits_step  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("rank", [0, 1])
async def test_plans_are_answered_until_the_router_closes_the_stream(
    tmp_path: Path, rank: int
) -> None:
    async with serving(tmp_path, scripted(rank)) as client:
        assert not client.worker.streams
        stream = client.stub.Run()
        await stream.write(first_plan(1, epoch=9))
        assert (await stream.read()).plan_id == 1
        assert client.worker.streams
        leaving = asyncio.create_task(client.worker.leave())
        await heard_leaving(stream, 9)
        assert await client.health() == NOT_SERVING
        for plan_id in (2, 3):
            await stream.write(next_plan(plan_id, 1, epoch=9))
            outcome = await stream.read()
            assert (outcome.plan_id, outcome.leaving) == (plan_id, False)
        assert not leaving.done()
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        await leaving
        assert not client.worker.streams


async def test_a_stream_that_is_cancelled_is_closed_too(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        stream = client.stub.Run()
        await stream.initial_metadata()
        leaving = asyncio.create_task(client.worker.leave())
        await heard_leaving(stream, 0)
        stream.cancel()
        await leaving


async def test_without_a_stream_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        await client.worker.leave()
        assert await client.health() == NOT_SERVING


async def test_a_stream_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        stream = client.stub.Run()
        await stream.write(next_plan(5, 1))
        await client.fault(stream)
        await client.worker.leave()


async def test_the_message_stands_between_answers(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()
    async with serving(tmp_path, lambda: gated(gate)) as client:
        stream = client.stub.Run()
        await stream.initial_metadata()
        gate.clear()
        await stream.write(first_plan(1))
        leaving = asyncio.create_task(client.worker.leave())
        said = await stream.read()
        assert said.leaving
        gate.set()
        assert (await stream.read()).plan_id == 1
        stream.cancel()
        await leaving


async def test_a_stream_is_told_only_once_its_engine_is_empty(tmp_path: Path) -> None:
    """The message would bring the metadata with it that says so."""
    gate = threading.Event()
    async with serving(tmp_path, lambda: gated(gate)) as client:
        stream = client.stub.Run()
        while not client.worker.streams:
            await asyncio.sleep(0.01)
        leaving = asyncio.create_task(client.worker.leave())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(stream.initial_metadata()), 0.05)
        gate.set()
        await heard_leaving(stream, 0)
        await stream.write(first_plan(1))
        assert (await stream.read()).plan_id == 1
        stream.cancel()
        await leaving


async def test_new_callers_are_turned_away_and_those_of_the_stream_are_not(tmp_path: Path) -> None:
    options = EngineOptions(None, "m", 4096, 8, 256, adapters=(("prose", Path("p")),))
    async with serving(tmp_path, lambda: SkilledEngine(options)) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.read()
        leaving = asyncio.create_task(client.worker.leave())
        await heard_leaving(stream, 1)
        assert await refused(client.stub.Describe(pb.DescribeRequest())) == LEAVING
        assert await client.fault(client.stub.Run()) == LEAVING
        files = client.stub.GetTokenizer(pb.GetTokenizerRequest())
        assert await refused(files.read()) == LEAVING
        constraint = pb.Constraint(regex="[ab]+")
        await client.stub.Prepare(pb.PrepareRequest(constraint=constraint))
        embed = pb.EmbedRequest(inputs=[pb.EmbedInput(tokens=[1, 2])])
        assert len((await client.stub.Embed(embed)).embeddings) == 1
        # None of these has touched the stream.
        await stream.write(next_plan(2, 1))
        assert (await stream.read()).plan_id == 2
        stream.cancel()
        await leaving


async def test_who_waits_for_the_model_of_a_worker_that_stops_is_told(tmp_path: Path) -> None:
    gate = threading.Event()

    def make() -> Engine:
        gate.wait(PATIENCE_S)
        return scripted()()

    async with asyncio.timeout(PATIENCE_S):
        worker = Worker(make, f"unix://{tmp_path}/worker.sock")
        await worker.start()
        async with grpc.aio.insecure_channel(worker.address) as channel:
            client = Client(worker, channel)
            call = asyncio.ensure_future(client.stub.Describe(pb.DescribeRequest()))
            await client.health()  # is answered after the call before it has come
            assert worker.loading
            await worker.leave()
            assert await worker.stop() is False  # nothing to wait for: there is no engine yet
            assert await refused(call) == STOPPING
        gate.set()
