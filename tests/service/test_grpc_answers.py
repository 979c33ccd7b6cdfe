"""What ``router.v1.Inference`` asks for and reports beyond tokens and text."""

import asyncio
import json
import math
from dataclasses import replace
from typing import Any

import grpc
import pytest

from router.ask import Chunk, Constraint, ConstraintKind, TokenOut
from router.errors import Fault, RequestError
from router.v1 import router_pb2 as pb
from tests.service.fake_service import FakeService, Step, words
from tests.service.grpc_rig import details_of, failure, field_of, read, stub_of


async def test_what_a_prompt_may_say_arrives() -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        await read(stub.Generate(pb.GenerateRequest(text="x")))
        request = pb.GenerateRequest(
            text="x",
            truncate=3,
            add_special_tokens=False,
            parameters=pb.Parameters(prompt_logprobs=True, skip_special_tokens=False),
        )
        await read(stub.Generate(request))
    plain, ask = service.asks
    assert (plain.truncate, plain.add_special_tokens) == (None, True)
    assert plain.params.skip_special_tokens
    assert not plain.params.prompt_logprobs
    assert plain.params.constraint is None
    assert (ask.truncate, ask.add_special_tokens) == (3, False)
    assert not ask.params.skip_special_tokens
    assert ask.params.prompt_logprobs


SCHEMA = {"type": "object", "properties": {"zebra": {}, "apple": {}}}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json_object": {}}, ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
        ({"regex": "[ab]+"}, ConstraintKind.REGEX, "[ab]+"),
        ({"choice": {"options": ["a", "b"]}}, ConstraintKind.LARK, 'start: CHOICE\nCHOICE: "a"'),
        ({"grammar": 'root ::= "x"'}, ConstraintKind.LARK, 'root ::= "x"'),
        (
            {"json_schema": json.dumps(SCHEMA)},
            ConstraintKind.JSON_SCHEMA,
            json.dumps(SCHEMA, separators=(",", ":")),  # with the order of its properties
        ),
    ],
)
async def test_constraints_arrive(
    given: dict[str, object], kind: ConstraintKind, text: str
) -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        constraint = pb.Constraint(**given)  # type: ignore[arg-type]
        parameters = pb.Parameters(constraint=constraint)
        await read(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
    found = service.asks[0].params.constraint
    assert isinstance(found, Constraint)
    assert found.kind is kind
    assert found.text.startswith(text)
    assert found.field == f"constraint.{next(iter(given))}"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"json_schema": "{"}, "constraint.json_schema"),
        ({"json_schema": "[]"}, "constraint.json_schema"),
        ({"regex": ""}, "constraint.regex"),
        ({"choice": {"options": []}}, "constraint.choice"),
        ({"choice": {"options": ["a", ""]}}, "constraint.choice"),
        ({"grammar": ""}, "constraint.grammar"),
    ],
)
async def test_constraints_that_mean_nothing_are_refused(
    given: dict[str, object], field: str
) -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        constraint = pb.Constraint(**given)  # type: ignore[arg-type]
        parameters = pb.Parameters(constraint=constraint)
        error = await failure(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert service.asks == []


async def test_tokens_in_detail() -> None:
    script = words(("a", "b"), tops=2)
    last = script[-1]
    assert isinstance(last, Chunk)
    end = replace(last.tokens[0], text="</s>", special=True)
    script[-1] = replace(last, tokens=(end,))
    service = FakeService(script)
    async with stub_of(service) as stub:
        parameters = pb.Parameters(token_details=True, top_logprobs=2, stream_tokens=2)
        (message,) = await read(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
        assert list(message.token_texts) == ["a", "</s>"]
        assert list(message.special) == [False, True]
        assert [list(top.texts) for top in message.top_logprobs] == [["t0", "t1"]] * 2
        (plain, *_) = await read(stub.Generate(pb.GenerateRequest(text="x")))
        assert not plain.token_texts
        assert not plain.special


async def test_the_prompt_is_told_with_its_scores() -> None:
    script = words(("a",))
    last = script[-1]
    assert isinstance(last, Chunk)
    assert last.finish is not None
    prompt = (TokenOut(1, "<s>"), TokenOut(2, "Hi", logprob=-1.5, top=((3, "Ho", -0.5),)))
    script[-1] = replace(last, finish=replace(last.finish, prompt=prompt))
    async with stub_of(FakeService(script)) as stub:
        parameters = pb.Parameters(prompt_logprobs=True, top_logprobs=1, token_details=True)
        (message,) = await read(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
    first, second = message.finish.prompt
    assert (first.id, first.text, first.HasField("logprob")) == (1, "<s>", False)
    assert (second.id, second.text, second.logprob) == (2, "Hi", -1.5)
    assert (list(second.top.token_ids), list(second.top.texts)) == ([3], ["Ho"])


async def test_several_answers_share_a_stream() -> None:
    service = FakeService(words(("a", "b", "c")), words(("x", "y")))
    async with stub_of(service) as stub:
        parameters = pb.Parameters(n=2, seed=2**64 - 1, temperature=1)
        messages = await read(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
    texts = {0: "", 1: ""}
    for message in messages:
        texts[message.choice] += message.text
    assert texts == {0: "abc", 1: "xy"}
    ends = [message.choice for message in messages if message.HasField("finish")]
    assert sorted(ends) == [0, 1]
    assert [ask.params.seed for ask in service.asks] == [2**64 - 1, 0]


async def test_one_failure_of_several_ends_all() -> None:
    gone = RequestError(Fault.WORKER_LOST, "gone")
    hanging: list[Step] = [*words()[:1], asyncio.Event()]
    service = FakeService(hanging, [*words()[:1], gone])
    async with stub_of(service) as stub, asyncio.timeout(10):
        request = pb.GenerateRequest(text="x", parameters=pb.Parameters(n=2))
        error = await failure(stub.Generate(request))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(error)["ErrorInfo"].reason == "WORKER_LOST"
        await service.left.wait()
    assert (service.open, service.cancelled) == (0, 1)


async def test_cancelling_ends_all_answers() -> None:
    service = FakeService([asyncio.Event()])
    async with stub_of(service) as stub, asyncio.timeout(10):
        call = stub.Generate(pb.GenerateRequest(text="x", parameters=pb.Parameters(n=3)))
        reading = asyncio.ensure_future(failure(call))
        while service.open < 3:
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        while service.open:
            await asyncio.sleep(0.001)
    assert service.cancelled == 3


async def test_the_best_are_sent() -> None:
    scripts = [words((text,), mean=mean) for text, mean in (("a", -3), ("b", -1), ("c", -2))]
    service = FakeService(*scripts)
    parameters = pb.Parameters(n=2, temperature=1)
    async with stub_of(service, max_best_of=3) as stub:
        request = pb.GenerateRequest(text="x", best_of=3, parameters=parameters)
        messages = await read(stub.Generate(request))
    assert [(message.choice, message.text) for message in messages] == [(0, "b"), (1, "c")]
    assert all(message.HasField("finish") for message in messages)
    assert not messages[0].logprobs  # they were needed, not asked for
    assert all(ask.params.logprobs for ask in service.asks)


@pytest.mark.parametrize(
    ("best_of", "parameters", "field"),
    [
        (3, {"temperature": 1.0}, "best_of"),  # over max_best_of
        (2, {"temperature": 0.0}, "best_of"),
        (2, {"n": 3}, "best_of"),
        (0, {"n": 129}, "n"),
    ],
)
async def test_counts_have_limits(best_of: int, parameters: dict[str, float], field: str) -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        request = pb.GenerateRequest(
            text="x",
            best_of=best_of,
            parameters=pb.Parameters(**parameters),  # type: ignore[arg-type]
        )
        error = await failure(stub.Generate(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert service.asks == []


async def test_an_unknown_log_probability_is_not_a_number() -> None:
    finish = words()[-1]
    assert isinstance(finish, Chunk)
    script = [replace(finish, tokens=(TokenOut(1, "a"),))]
    async with stub_of(FakeService(script)) as stub:
        parameters = pb.Parameters(logprobs=True)
        (message,) = await read(stub.Generate(pb.GenerateRequest(text="x", parameters=parameters)))
    assert math.isnan(message.logprobs[0])


async def test_each_method_has_the_limit_of_a_message() -> None:
    """The port's own limit may be larger, for the sake of gateways."""
    service = FakeService()
    async with stub_of(service, payload_limit=900) as stub:
        assert await read(stub.Generate(pb.GenerateRequest(text="x" * 800)))
        error = await failure(stub.Generate(pb.GenerateRequest(text="x" * 900)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("request_of", "prompt"),
    [
        ({"text": "x"}, "text"),
        ({"token_ids": {"ids": [1]}}, "token_ids"),
    ],
)
async def test_errors_speak_of_the_fields_of_this_protocol(
    request_of: dict[str, Any], prompt: str
) -> None:
    service = FakeService()
    text = "`inputs` tokens + `max_new_tokens` must be <= 9. `top_n_tokens` is too high"
    text += ". `adapter_id` is not loaded"
    for field, shown in (("prompt", prompt), ("max_tokens", "max_tokens")):
        service.refusal = RequestError(Fault.VALIDATION, text, field)
        async with stub_of(service) as stub:
            error = await failure(stub.Generate(pb.GenerateRequest(**request_of)))
        assert error.details() == (
            f"`{prompt}` tokens + `max_tokens` must be <= 9. `top_logprobs` is too high"
            ". `adapter` is not loaded"
        )
        assert field_of(error) == shown
