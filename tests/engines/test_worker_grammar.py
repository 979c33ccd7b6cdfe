"""Constraints over a real gRPC server and client: compiled beside the log of plans."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from shards import grammar_queue
from shards.engines.base import Constraint, ConstraintKind, Engine
from shards.engines.scripted import ScriptedEngine
from shards.grammar import Grammar
from shards.v1 import shard_pb2 as pb
from tests.engines.bench import PATIENCE_S, Client, first_plan, next_plan, scripted, serving

YES = pb.Constraint(lark='start: "yes"')
Codes = grpc.StatusCode


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(tmp_path, scripted()) as client:
        yield client


def regex(pattern: str) -> pb.Constraint:
    return pb.Constraint(regex=pattern)


def prepare(client: Client, constraint: pb.Constraint) -> grpc.aio.UnaryUnaryCall:
    return client.stub.Prepare(pb.PrepareRequest(constraint=constraint))


async def refusal(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def grammar_of(client: Client) -> Grammar:
    grammar = client.worker._engine.loaded.result().grammar
    assert grammar is not None
    return grammar


class Gate:
    """Holds up the compiling of all constraints but those that hold the word "open"."""

    def __init__(self, grammar: Grammar) -> None:
        self.compiled: list[str] = []
        self._event = threading.Event()
        self._compile = grammar._compile
        grammar._compile = self._wait  # type: ignore[method-assign]

    def _wait(self, constraint: Constraint) -> object:
        if "open" not in constraint.text:
            self._event.wait(PATIENCE_S)
        self.compiled.append(constraint.text)
        return self._compile(constraint)

    def open(self) -> None:
        self._event.set()


def constrained(*sequences: int, constraint: pb.Constraint) -> pb.Plan:
    return first_plan(*sequences, sampling=pb.Sampling(constraint=constraint))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_offers_it_and_compiles_ahead(client: Client) -> None:
    assert "grammar" in (await client.stub.Describe(pb.DescribeRequest())).features
    await prepare(client, YES)
    assert grammar_of(client).knows(Constraint(ConstraintKind.LARK, YES.lark))


async def test_refuses_what_cannot_be_compiled(client: Client) -> None:
    assert await refusal(prepare(client, regex("ab["))) == (
        Codes.INVALID_ARGUMENT,
        "unclosed character class (at character 3 of the pattern)",
    )
    code, details = await refusal(prepare(client, pb.Constraint()))
    assert (code, details) == (Codes.INVALID_ARGUMENT, "the call has no constraint")


async def test_an_engine_without_the_feature_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path, lambda: Featureless(scripted()())) as client:
        code, details = await refusal(prepare(client, YES))
    assert (code, details) == (Codes.UNIMPLEMENTED, "engine scripted does not support grammar")


class Featureless(ScriptedEngine):
    """The engine with a tokenizer that llguidance cannot use."""

    def __init__(self, engine: Engine) -> None:
        self.__dict__.update(engine.__dict__)

    def tokenizer_files(self) -> dict[str, bytes]:
        return {**super().tokenizer_files(), "tokenizer.json": b'{"model": {}}'}


async def test_a_tokenizer_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    async with serving(tmp_path, lambda: Featureless(scripted()())) as client:
        told = await client.stub.Describe(pb.DescribeRequest())
    assert "grammar" not in told.features
    assert "seed" in told.features
    (warning,) = told.warnings
    assert warning.startswith("constraints are not offered")
    assert "\n" not in warning


async def test_equal_constraints_are_compiled_once(client: Client) -> None:
    gate = Gate(grammar_of(client))
    calls = [prepare(client, regex("same")) for _ in range(5)]
    other = prepare(client, regex("other"))
    servicer = client.worker._servicer
    await until(lambda: servicer._grammars is not None and len(servicer._grammars._answers) == 2)
    gate.open()
    await asyncio.gather(*calls, other)
    await prepare(client, regex("same"))
    assert sorted(gate.compiled) == ["other", "same"]


async def test_one_that_takes_long_does_not_hold_up_another(client: Client) -> None:
    gate = Gate(grammar_of(client))
    slow = prepare(client, regex("slow"))
    await until(lambda: client.worker._servicer._grammars)
    await prepare(client, regex("open"))
    assert gate.compiled == ["open"]
    gate.open()
    await slow


async def test_too_many_are_turned_away_and_a_cancelled_one_harms_nobody(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_queue, "WAITING_MAX", 3)
    gate = Gate(grammar_of(client))
    calls = [prepare(client, regex(f"r{number}")) for number in range(3)]
    queue = client.worker._servicer
    await until(lambda: queue._grammars is not None and len(queue._grammars._answers) == 3)
    code, details = await refusal(prepare(client, regex("one more")))
    assert (code, details.partition(" ")[0]) == (Codes.RESOURCE_EXHAUSTED, "3")
    again = prepare(client, regex("r0"))
    calls[0].cancel()
    gate.open()
    await asyncio.gather(*calls[1:], again)
    await prepare(client, regex("one more"))
    assert sorted(gate.compiled) == ["one more", "r0", "r1", "r2"]


async def test_a_plan_waits_for_its_constraints_and_those_behind_it_too(client: Client) -> None:
    gate = Gate(grammar_of(client))
    stream = client.stub.Run()
    await stream.write(first_plan(1))
    assert (await stream.read()).plan_id == 1
    unknown = constrained(2, constraint=YES)
    unknown.plan_id = 2
    await stream.write(unknown)
    await stream.write(next_plan(3, 1))
    await until(lambda: client.worker._servicer._grammars and gate.compiled == [])
    engine = client.worker._engine
    assert engine._jobs.empty()
    # The worker answers all else meanwhile.
    await client.stub.Describe(pb.DescribeRequest())
    await prepare(client, regex("open"))
    gate.open()
    outcomes = [await stream.read() for _ in range(2)]
    assert [outcome.plan_id for outcome in outcomes] == [2, 3]
    assert list(outcomes[0].sequences) == [2]
    assert not outcomes[0].failures
    await stream.done_writing()


async def test_what_cannot_be_compiled_ends_one_sequence_and_not_the_log(client: Client) -> None:
    stream = client.stub.Run()
    await stream.write(constrained(1, constraint=regex("ab[")))
    outcome = await stream.read()
    assert [failure.sequence for failure in outcome.failures] == [1]
    assert "unclosed" in outcome.failures[0].message
    plan = first_plan(2)
    plan.plan_id = 2
    await stream.write(plan)
    assert list((await stream.read()).sequences) == [2]
    await stream.done_writing()


async def test_ranks_draw_the_same_under_a_constraint(tmp_path: Path) -> None:
    digests = []
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        async with serving(folder, scripted(rank)) as client:
            stream = client.stub.Run()
            await stream.write(constrained(1, 2, constraint=regex("[a-z]{20}")))
            for plan_id in range(2, 10):
                await stream.write(next_plan(plan_id, 1, 2))
            digests.append([(await stream.read()).digest for _ in range(9)])
            await stream.done_writing()
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 9
