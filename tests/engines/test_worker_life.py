"""How a worker starts and ends: loading, the loss of its engine, a step that hangs, a stop."""

import asyncio
import threading
from pathlib import Path

import grpc
import grpc.aio
import pytest

from shards import worker as worker_module
from shards.engines.base import Engine, ModelError, Outcome, Plan
from shards.v1 import shard_pb2 as pb
from shards.worker import Worker
from tests.engines.bench import (
    NOT_SERVING,
    PATIENCE_S,
    SERVING,
    Client,
    first_plan,
    next_plan,
    scripted,
    serving,
)


async def test_the_loss_of_the_engine_ends_stream_and_health(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted(lost_after_steps=1)) as client:
        assert await client.health() == SERVING
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.write(next_plan(2, 1))
        code, details = await client.fault(stream)
        assert code is grpc.StatusCode.INTERNAL
        assert details == "the script loses its device after 1 steps"
        assert await client.worker.lost() == details
        assert await client.health() == NOT_SERVING
        assert (await client.fault(client.stub.Run()))[0] is grpc.StatusCode.INTERNAL


async def test_a_bug_in_the_engine_is_its_loss(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def make() -> Engine:
        engine = scripted()()
        engine.step = lambda _plan: 1 // 0  # type: ignore[method-assign, assignment, return-value]
        return engine

    async with serving(tmp_path, make) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        code, details = await client.fault(stream)
        assert code is grpc.StatusCode.INTERNAL
        assert "ZeroDivisionError" in details
    assert "Traceback" in capfd.readouterr().err


async def test_not_serving_while_loading(tmp_path: Path) -> None:
    gate = threading.Event()

    def make() -> Engine:
        gate.wait(PATIENCE_S)
        return scripted()()

    async with asyncio.timeout(PATIENCE_S):
        worker = Worker(make, f"unix://{tmp_path}/worker.sock")
        await worker.start()
        async with grpc.aio.insecure_channel(worker.address) as channel:
            client = Client(worker, channel)
            assert await client.health() == NOT_SERVING
            asked = asyncio.ensure_future(client.stub.Describe(pb.DescribeRequest()))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.stub.Describe(pb.DescribeRequest(), timeout=0.05)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            gate.set()
            assert (await asked).engine == "scripted"
            await worker.ready()
            assert await client.health() == SERVING
        await worker.stop()


async def test_a_model_that_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    def make() -> Engine:
        raise ModelError("model file x: does not exist")

    async with asyncio.timeout(PATIENCE_S):
        worker = Worker(make, f"unix://{tmp_path}/worker.sock")
        await worker.start()
        with pytest.raises(ModelError, match="does not exist"):
            await worker.ready()
        await worker.stop()


async def test_stopping_ends_streams(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.read()
        stopping = asyncio.ensure_future(client.worker.stop())
        assert await client.fault(stream) == (
            grpc.StatusCode.UNAVAILABLE,
            "the worker is stopping",
        )
        assert await stopping is True


async def test_a_step_that_never_ends_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "GRACE_S", 0.05)
    gate, inside = threading.Event(), threading.Event()

    def make() -> Engine:
        engine = scripted()()

        def wedge(_plan: Plan) -> Outcome:
            inside.set()
            gate.wait(PATIENCE_S)
            return Outcome()

        engine.step = wedge  # type: ignore[method-assign]
        return engine

    async with serving(tmp_path, make) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await asyncio.to_thread(inside.wait, PATIENCE_S)
        # A new stream hears nothing while the engine hangs: it must not seem ready.
        fresh = client.stub.Run()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fresh.initial_metadata(), 0.05)
        assert await client.worker.stop() is False
        gate.set()


async def test_an_engine_that_hangs_is_not_healthy_until_it_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def make() -> Engine:
        engine = scripted()()
        step = engine.step

        def slow(plan: Plan) -> Outcome:
            gate.wait(PATIENCE_S)
            return step(plan)

        engine.step = slow  # type: ignore[method-assign]
        return engine

    async with serving(tmp_path, make) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        assert await client.health() == SERVING  # so far it may only be slow
        monkeypatch.setattr(worker_module, "HANGS_S", 0.05)
        async with asyncio.timeout(PATIENCE_S):
            while await client.health() == SERVING:
                await asyncio.sleep(0.01)
            gate.set()
            await stream.read()
            while await client.health() != SERVING:
                await asyncio.sleep(0.01)
