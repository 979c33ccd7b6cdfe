"""The worker over a real gRPC server and client: what it answers to a log of plans."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shards import engines
from shards.engines.base import Engine, EngineOptions, Outcome, Plan
from shards.v1 import shard_pb2 as pb
from shards.wire import CHUNK_BYTES, file_chunks, files_sha256, plan_from_wire
from shards.worker import SERVICE
from tests.engines.bench import PATIENCE_S, Client, first_plan, next_plan, scripted, serving


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(tmp_path, scripted()) as client:
        yield client


async def test_describes_the_engine(client: Client) -> None:
    told = await client.stub.Describe(pb.DescribeRequest())
    assert told.engine == "scripted"
    assert told.model_id == "m"
    assert told.scheduling == pb.SCHEDULING_KIND_CALLER
    assert (told.rank, told.world) == (0, 1)
    assert (told.kv_tokens, told.sequences_max, told.step_tokens_max) == (4096, 8, 256)
    assert told.page_tokens == 1
    assert told.length_max == 4096
    assert "prefix_sharing" in told.features
    assert len(told.instance_id) == 32
    assert len(told.tokenizer_sha256) == 64
    again = await client.stub.Describe(pb.DescribeRequest())
    assert again == told


async def test_tokenizer_files_arrive_whole(client: Client) -> None:
    files: dict[str, bytes] = {}
    async for chunk in client.stub.GetTokenizer(pb.GetTokenizerRequest()):
        files[chunk.name] = files.get(chunk.name, b"") + chunk.data
    assert files == scripted()().tokenizer_files()
    told = await client.stub.Describe(pb.DescribeRequest())
    assert files_sha256(files) == told.tokenizer_sha256


def test_large_files_go_in_pieces() -> None:
    files = {"b": b"x" * (2 * CHUNK_BYTES + 1), "a": b""}
    chunks = list(file_chunks(files))
    assert [(c.name, len(c.data)) for c in chunks] == [
        ("a", 0),
        ("b", CHUNK_BYTES),
        ("b", CHUNK_BYTES),
        ("b", 1),
    ]


async def test_two_plans_in_flight_are_answered_in_order(client: Client) -> None:
    stream = client.stub.Run()
    await stream.write(first_plan(1, 2))
    await stream.write(next_plan(2, 1, 2))
    outcomes = [await stream.read(), await stream.read()]
    assert [o.plan_id for o in outcomes] == [1, 2]
    assert [list(o.sequences) for o in outcomes] == [[1, 2], [1, 2]]
    direct = scripted()()
    expected = [
        direct.step(plan_from_wire(first_plan(1, 2))).tokens,
        direct.step(Plan(work=[(1, 1), (2, 1)])).tokens,
    ]
    assert [list(o.tokens) for o in outcomes] == expected
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() == grpc.StatusCode.OK


async def test_a_plan_without_work_is_answered(client: Client) -> None:
    stream = client.stub.Run()
    await stream.write(pb.Plan(epoch=5, plan_id=1))
    outcome = await stream.read()
    assert (outcome.epoch, outcome.plan_id, list(outcome.sequences)) == (5, 1, [])


async def test_initial_metadata_says_that_the_engine_is_empty(client: Client) -> None:
    stream = client.stub.Run()
    assert await stream.initial_metadata() is not None


async def test_a_second_stream_takes_over_and_starts_empty(client: Client) -> None:
    old = client.stub.Run()
    await old.write(first_plan(1))
    first = await old.read()
    new = client.stub.Run()
    await new.write(first_plan(1, epoch=2))
    again = await new.read()
    assert again.epoch == 2
    assert again.tokens == first.tokens
    # The digest is of this epoch only, and the same log gives the same.
    assert again.digest == first.digest
    assert await client.fault(old) == (
        grpc.StatusCode.ABORTED,
        "another Run stream took over",
    )


async def test_plans_of_a_stream_that_was_taken_over_are_not_run(tmp_path: Path) -> None:
    gate = threading.Event()
    ran: list[Plan] = []

    def make() -> Engine:
        engine = scripted()()
        step = engine.step

        def slow(plan: Plan) -> Outcome:
            ran.append(plan)
            gate.wait(PATIENCE_S)
            return step(plan)

        engine.step = slow  # type: ignore[method-assign]
        return engine

    async with serving(tmp_path, make) as client:
        old = client.stub.Run()
        await old.write(first_plan(1))
        await old.write(next_plan(2, 1))
        while not ran:
            await asyncio.sleep(0)
        new = client.stub.Run()
        await new.write(first_plan(3, epoch=2))
        assert (await client.fault(old))[0] is grpc.StatusCode.ABORTED
        gate.set()
        assert list((await new.read()).sequences) == [3]
    assert [len(plan.admits) for plan in ran] == [1, 1]


@pytest.mark.parametrize(
    ("second", "code", "message"),
    [
        (next_plan(3, 1), grpc.StatusCode.FAILED_PRECONDITION, "plan 3 of epoch 1 came where 2"),
        (next_plan(1, 1), grpc.StatusCode.FAILED_PRECONDITION, "plan 1 of epoch 1 came where 2"),
        (next_plan(2, 1, epoch=9), grpc.StatusCode.FAILED_PRECONDITION, "of epoch 9 came where"),
        (next_plan(2, 7), grpc.StatusCode.INVALID_ARGUMENT, "plan 2: work for sequence 7"),
        (
            pb.Plan(epoch=1, plan_id=2, work_sequences=[1]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "work_sequences has 1 entries",
        ),
    ],
)
async def test_a_bad_plan_ends_the_stream_after_earlier_answers(
    client: Client, second: pb.Plan, code: grpc.StatusCode, message: str
) -> None:
    stream = client.stub.Run()
    await stream.write(first_plan(1))
    await stream.write(second)
    assert (await stream.read()).plan_id == 1
    ended, details = await client.fault(stream)
    assert ended is code
    assert message in details
    assert "\n" not in details
    # The worker is none the worse for it.
    fresh = client.stub.Run()
    await fresh.write(first_plan(1, epoch=2))
    assert (await fresh.read()).epoch == 2


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (pb.Sampling(temperature=float("nan")), "temperature is nan"),
        (pb.Sampling(temperature=-1), "temperature is -1"),
        (pb.Sampling(top_p=1.5), "top_p is 1.5"),
        (pb.Sampling(repetition_penalty=float("inf")), "repetition_penalty is inf"),
        (pb.Sampling(bias_tokens=[1]), "bias_tokens and bias_values"),
        (pb.Sampling(bias_tokens=[1], bias_values=[float("nan")]), "bias is not finite"),
    ],
)
async def test_impossible_sampling_is_refused(
    client: Client, sampling: pb.Sampling, message: str
) -> None:
    stream = client.stub.Run()
    await stream.write(first_plan(1, sampling=sampling))
    code, details = await client.fault(stream)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in details


async def test_logprobs_come_for_those_who_asked(client: Client) -> None:
    stream = client.stub.Run()
    plan = first_plan(1, 2)
    plan.admits[1].sampling.CopyFrom(pb.Sampling(logprobs=True, top_logprobs=2))
    await stream.write(plan)
    outcome = await stream.read()
    assert [entry.sequence for entry in outcome.logprobs] == [2]
    assert outcome.logprobs[0].logprob < 0
    assert len(outcome.logprobs[0].top_tokens) == len(outcome.logprobs[0].top_values) == 2


async def test_a_failed_sequence_is_reported(tmp_path: Path) -> None:
    async with serving(tmp_path, scripted(fail_sequence_after=1)) as client:
        stream = client.stub.Run()
        await stream.write(first_plan(1))
        await stream.write(next_plan(2, 1))
        await stream.read()
        outcome = await stream.read()
        assert [(f.sequence, f.message) for f in outcome.failures] == [
            (1, "the script fails after 1 tokens")
        ]


async def test_other_ranks_tell_the_digest_only(tmp_path: Path) -> None:
    digests = []
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        async with serving(folder, scripted(rank)) as client:
            stream = client.stub.Run()
            await stream.write(first_plan(1, 2))
            await stream.write(next_plan(2, 1))
            outcomes = [await stream.read(), await stream.read()]
            digests.append([outcome.digest for outcome in outcomes])
            assert bool(outcomes[0].tokens) == (rank == 0)
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[0][1]


async def test_digests_differ_when_logs_do(client: Client) -> None:
    async def digest(*plans: pb.Plan) -> int:
        stream = client.stub.Run()
        for plan in plans:
            await stream.write(plan)
        last = [await stream.read() for _ in plans][-1]
        await stream.done_writing()
        return last.digest

    other_tokens = first_plan(1, 2)
    other_tokens.admits[0].tokens[0] = 99
    logs = [
        (first_plan(1, 2),),
        (first_plan(1),),
        (other_tokens,),
        (first_plan(1, 2), next_plan(2, 1)),
        (first_plan(1, 2), next_plan(2, 2)),
        (first_plan(1, 2), pb.Plan(epoch=1, plan_id=2, drops=[1])),
    ]
    assert len({await digest(*log) for log in logs}) == len(logs)


async def test_reflection_names_the_service(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    stream = stub.ServerReflectionInfo()
    await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await stream.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    stream.cancel()


async def test_a_long_prompt_fits_in_a_message(tmp_path: Path) -> None:
    options = EngineOptions(
        None, "m", kv_tokens=1 << 21, step_tokens_max=1 << 21, extra=(("length_max", "2000000"),)
    )
    async with serving(
        tmp_path, lambda: engines.load("scripted", options, lambda _fraction: None)
    ) as client:
        stream = client.stub.Run()
        tokens = [200] * 1_900_000
        admit = pb.Admit(sequence=1, tokens=tokens, prompt_len=len(tokens))
        await stream.write(
            pb.Plan(
                epoch=1,
                plan_id=1,
                admits=[admit],
                work_sequences=[1],
                work_tokens=[len(tokens)],
            )
        )
        assert list((await stream.read()).sequences) == [1]
