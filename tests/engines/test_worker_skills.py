"""Adapters and embeddings over a real gRPC server and client."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest

from shards.embed_queue import WAITING_MAX
from shards.engines.base import EngineLost, EngineOptions, Outcome, Plan, Vectors
from shards.v1 import shard_pb2 as pb
from shards.wire import EMBED_INPUTS_MAX
from tests.engines.bench import (
    NOT_SERVING,
    PATIENCE_S,
    Client,
    first_plan,
    next_plan,
    scripted,
    serving,
)
from tests.engines.skilled import EMBED_TOKENS_MAX, SkilledEngine, vector_of

ADAPTERS = (("prose", Path("p")), ("verse", Path("v")))


class Gated(SkilledEngine):
    """Waits at its gate before it embeds; ``done`` is the order in which work was done.

    A batch takes so many ``turns``.
    """

    def __init__(self) -> None:
        super().__init__(EngineOptions(None, "m", 4096, 8, 256, adapters=ADAPTERS))
        self.gate = threading.Event()
        self.gate.set()
        self.done: list[str] = []
        self.turns = 1
        self.fault: Exception | None = None

    def step(self, plan: Plan) -> Outcome:
        if plan.work:
            self.done.append("step")
        return super().step(plan)

    def embedding(self, inputs: Sequence[Sequence[int]]) -> Iterator[Vectors | None]:
        for _ in range(self.turns - 1):
            self.gate.wait(PATIENCE_S)
            self.done.append("turn")
            yield None
        yield from super().embedding(inputs)

    def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        self.gate.wait(PATIENCE_S)
        self.done.append("embed")
        if self.fault is not None:
            raise self.fault
        return super().embed(inputs)


@pytest.fixture
def engine() -> Gated:
    return Gated()


@pytest.fixture
async def client(tmp_path: Path, engine: Gated) -> AsyncIterator[Client]:
    async with serving(tmp_path, lambda: engine) as client:
        yield client


def request(*inputs: list[int]) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.EmbedInput(tokens=tokens) for tokens in inputs])


async def until_running(engine: Gated, client: Client) -> list[grpc.aio.UnaryUnaryCall]:
    """A call whose batch the engine has begun, and holds at its gate."""
    engine.gate.clear()
    call = client.stub.Embed(request([1, 2]))
    queue = client.worker._engine.embeds
    while queue._current is None:
        await asyncio.sleep(0.001)
    return [call]


async def refusal(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


# --- adapters


async def test_says_which_adapters_there_are(client: Client) -> None:
    told = await client.stub.Describe(pb.DescribeRequest())
    assert list(told.adapters) == ["prose", "verse"]
    assert told.embed_tokens_max == EMBED_TOKENS_MAX


async def test_a_sequence_is_computed_with_the_adapter_of_its_admit(client: Client) -> None:
    drawn, digests = {}, set()
    for epoch, adapter in enumerate(("", "verse", "prose"), start=1):
        stream = client.stub.Run()
        await stream.write(first_plan(1, epoch=epoch, adapter=adapter))
        outcome = await stream.read()
        drawn[adapter] = list(outcome.tokens)
        digests.add(outcome.digest)
        await stream.done_writing()
    assert len({tuple(tokens) for tokens in drawn.values()}) == len(digests) == 3


async def test_ranks_that_use_different_adapters_differ_in_their_digests(client: Client) -> None:
    """Even where the adapter makes no difference to what is drawn: here nothing is."""
    digests = set()
    for epoch, adapter in enumerate(("", "verse"), start=1):
        stream = client.stub.Run()
        plan = first_plan(1, epoch=epoch, adapter=adapter)
        del plan.work_sequences[:], plan.work_tokens[:]
        await stream.write(plan)
        digests.add((await stream.read()).digest)
        await stream.done_writing()
    assert len(digests) == 2


async def test_an_unknown_adapter_breaks_the_contract(client: Client, engine: Gated) -> None:
    stream = client.stub.Run()
    await stream.write(first_plan(1, adapter="rhyme"))
    code, details = await client.fault(stream)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == (
        "plan 1: admit of sequence 1 with the adapter 'rhyme'; the engine has prose, verse"
    )
    assert engine.done == []


async def test_an_engine_without_adapters_has_none(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1, adapter="verse"))
        assert "the engine has none" in (await client.fault(stream))[1]


# --- embeddings


async def test_inputs_become_vectors_in_their_order(client: Client, engine: Gated) -> None:
    inputs = [[5], [1] * 10, [2] * 6, [3] * 16, [4], [7, 8]]
    answer = await client.stub.Embed(request(*inputs))
    found = [list(one.values) for one in answer.embeddings]
    assert found == [pytest.approx(vector_of(tokens)) for tokens in inputs]
    # As many together as the engine takes, and no more.
    assert engine.batches == [[[5], [1] * 10], [[2] * 6], [[3] * 16], [[4], [7, 8]]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], f"0 inputs were sent; it must be 1 to {EMBED_INPUTS_MAX}"),
        ([[1]] * (EMBED_INPUTS_MAX + 1), f"{EMBED_INPUTS_MAX + 1} inputs were sent"),
        ([[1], []], "input 1 has 0 tokens; it must be 1 to 16"),
        ([[1] * 17], "input 0 has 17 tokens"),
        ([[1, 1 << 20]], "input 0 has a token outside the vocabulary"),
    ],
)
async def test_impossible_inputs_are_refused(
    client: Client, engine: Gated, inputs: list[list[int]], message: str
) -> None:
    code, details = await refusal(client.stub.Embed(request(*inputs)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details
    assert engine.done == []


async def test_an_engine_that_cannot_embed_refuses_by_name(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted()) as client:
        assert await refusal(client.stub.Embed(request([1]))) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "engine scripted does not support embeddings",
        )


async def test_between_two_plans_there_is_one_batch_at_most(client: Client, engine: Gated) -> None:
    calls = await until_running(engine, client)
    calls += [client.stub.Embed(request([n + 1], [3] * 16)) for n in range(3)]
    stream = client.stub.Run()
    await stream.write(first_plan(1))
    for plan_id in range(2, 6):
        await stream.write(next_plan(plan_id, 1))
    queue, jobs = client.worker._engine.embeds, client.worker._engine._jobs
    while len(queue._waiting) < 3 or jobs.qsize() < 6:
        await asyncio.sleep(0.001)
    engine.gate.set()
    for _ in range(5):
        await stream.read()
    await asyncio.gather(*calls)
    assert engine.done.count("embed") == 7
    assert engine.done.count("step") == 5
    # All plans were there when the first batch was done: the others waited for them.
    assert engine.done[:6] == ["embed", *["step"] * 5]


async def test_plans_go_between_the_turns_of_a_batch(client: Client, engine: Gated) -> None:
    engine.turns = 3
    calls = await until_running(engine, client)
    stream = client.stub.Run()
    await stream.write(first_plan(1))
    for plan_id in range(2, 5):
        await stream.write(next_plan(plan_id, 1))
    while client.worker._engine._jobs.qsize() < 5:
        await asyncio.sleep(0.001)
    engine.gate.set()
    await asyncio.gather(*calls)
    for _ in range(4):
        await stream.read()
    assert engine.done[:7] == ["turn", *["step"] * 4, "turn", "embed"]


async def test_a_batch_that_nobody_waits_for_is_given_up_after_its_turn(
    client: Client, engine: Gated
) -> None:
    engine.turns = 3
    (call,) = await until_running(engine, client)
    job = client.worker._engine.embeds._current
    assert job is not None
    while job.turns is None:
        await asyncio.sleep(0.001)
    call.cancel()
    while not job.over:
        await asyncio.sleep(0.001)
    engine.gate.set()
    await client.stub.Embed(request([5]))
    assert engine.done == ["turn", "turn", "turn", "embed"]
    assert engine.batches == [[[5]]]


async def test_long_calls_take_turns_with_short_ones(client: Client, engine: Gated) -> None:
    calls = await until_running(engine, client)
    long = client.stub.Embed(request(*[[n] * 16 for n in range(1, 5)]))
    short = client.stub.Embed(request([9]))
    while len(client.worker._engine.embeds._waiting) < 2:
        await asyncio.sleep(0.001)
    engine.gate.set()
    await asyncio.gather(*calls, long, short)
    assert [[9]] in engine.batches[:4]


async def test_what_was_cancelled_is_not_computed(client: Client, engine: Gated) -> None:
    calls = await until_running(engine, client)
    gone = client.stub.Embed(request([3]))
    late = client.stub.Embed(request([4]), timeout=0.05)
    queue = client.worker._engine.embeds
    while len(queue._waiting) < 2:
        await asyncio.sleep(0.001)
    waiting = list(queue._waiting)
    gone.cancel()
    assert (await refusal(late))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    while not all(job.over for job in waiting):
        await asyncio.sleep(0.001)
    engine.gate.set()
    await asyncio.gather(*calls)
    await client.stub.Embed(request([5]))
    assert engine.batches == [[[1, 2]], [[5]]]


async def test_the_queue_is_bounded(client: Client, engine: Gated) -> None:
    calls = await until_running(engine, client)
    calls += [client.stub.Embed(request([1])) for _ in range(WAITING_MAX)]
    queue = client.worker._engine.embeds
    while len(queue._waiting) < WAITING_MAX:
        await asyncio.sleep(0.001)
    code, details = await refusal(client.stub.Embed(request([1])))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{WAITING_MAX} calls wait for embeddings already" in details
    engine.gate.set()
    await asyncio.gather(*calls)


@pytest.mark.parametrize("fault", [EngineLost("the device is gone"), ValueError("a bug")])
async def test_a_lost_engine_ends_calls_and_the_stream(
    client: Client, engine: Gated, fault: Exception
) -> None:
    stream = client.stub.Run()
    await stream.initial_metadata()
    calls = await until_running(engine, client)
    calls.append(client.stub.Embed(request([1])))
    while not client.worker._engine.embeds._waiting:
        await asyncio.sleep(0.001)
    engine.fault = fault
    engine.gate.set()
    for call in calls:
        code, details = await refusal(call)
        assert code is grpc.StatusCode.INTERNAL
        assert str(fault) in details
    assert (await client.fault(stream))[0] is grpc.StatusCode.INTERNAL
    assert str(fault) in await client.worker.lost()
    assert await client.health() == NOT_SERVING
    assert (await refusal(client.stub.Embed(request([1]))))[0] is grpc.StatusCode.INTERNAL
