"""``fmaas.GenerationService``, called with messages that know its numbers only."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from router.ask import Chunk, ConstraintKind, Finish, TokenOut
from router.core.events import Reason
from router.errors import Fault, RequestError
from tests.service import foreign
from tests.service.fake_service import FakeFleet, FakeService, Step, words
from tests.service.fmaas_rig import PB, batch, client_of, single
from tests.service.foreign import EOS_TOKEN, GREEDY, MAX_TOKENS, NOT_FINISHED, SAMPLE
from tests.service.grpc_rig import details_of, failure, field_of, read

TEXT = "Once upon a tîme 🙂"


async def generate(service: FakeService, text: str = "Hi", **params: Any) -> Any:
    async with client_of(service) as client:
        (answer,) = (await client.generate(batch(text, params=params))).responses
        return answer


async def stream(service: FakeService, text: str = "Hi", **params: Any) -> Any:
    async with client_of(service) as client:
        return await read(client.generate_stream(single(text, params=params)))


async def test_a_batch_is_answered_in_order() -> None:
    service = FakeService(words(("a", "b"), Reason.EOS), words(("x",)))
    async with client_of(service) as client:
        answer = await client.generate(batch("Hi", "Hello"))
    first, second = answer.responses
    assert (first.text, first.stop_reason, first.generated_token_count) == ("ab", EOS_TOKEN, 2)
    assert (second.text, second.stop_reason, second.generated_token_count) == ("x", MAX_TOKENS, 1)
    assert (first.input_token_count, second.input_token_count) == (2, 5)
    assert [ask.prompt for ask in service.asks] == [(39, 72), (39, 68, 75, 75, 78)]
    assert not first.tokens
    assert not first.input_tokens


async def test_a_stream_tells_of_the_input_first_and_of_the_end_last() -> None:
    messages = await stream(FakeService(words(reason=Reason.EOS)))
    first, *rest = messages
    assert (first.input_token_count, first.text, first.generated_token_count) == (2, "", 0)
    assert "".join(message.text for message in rest) == TEXT
    assert [message.generated_token_count for message in rest] == [1, 2, 3, 4, 5]
    assert [message.stop_reason for message in messages] == [NOT_FINISHED] * 5 + [EOS_TOKEN]
    assert not any(message.input_token_count for message in rest)


async def test_unset_parameters_mean_greedy_and_twenty_tokens() -> None:
    service = FakeService()
    await generate(service)
    params = service.asks[0].params
    assert (params.max_tokens, params.min_tokens, params.temperature) == (20, 0, 0)
    assert (params.top_k, params.top_p, params.typical_p, params.repetition_penalty) == (0, 1, 1, 1)
    assert params.include_stop
    assert params.seed is None
    assert params.constraint is None
    assert service.asks[0].deadline_s is None
    # What a greedy client says of sampling has no effect.
    await generate(service, sampling={"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 4})
    assert service.asks[1].params == params


async def test_parameters_arrive() -> None:
    service = FakeService()
    await generate(
        service,
        method=SAMPLE,
        sampling={"temperature": 0.5, "top_k": 3, "top_p": 0.25, "typical_p": 0.75, "seed": 2**40},
        stopping={
            "max_new_tokens": 9,
            "min_new_tokens": 2,
            "stop_sequences": ["a", "b"],
            "include_stop_sequence": False,
        },
        decoding={"repetition_penalty": 1.5},
        truncate_input_tokens=1,
    )
    await generate(service, method=SAMPLE)
    await generate(service, method=SAMPLE, sampling={"temperature": 0.0})
    first, second, third = service.asks
    params = first.params
    assert first.prompt == (72,)  # the last token of the input
    assert (params.temperature, params.top_k) == (0.5, 3)
    assert (params.top_p, params.typical_p) == (0.25, 0.75)
    assert (params.seed, params.max_tokens, params.min_tokens) == (2**40, 9, 2)
    assert (params.stop, params.include_stop) == (("a", "b"), False)
    assert params.repetition_penalty == 1.5
    assert second.params.temperature == 1.0
    assert third.params.temperature == 0.0


@pytest.mark.parametrize(
    ("decoding", "kind", "text"),
    [
        ({"format": 1}, ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
        ({"json_schema": '{"type": "array"}'}, ConstraintKind.JSON_SCHEMA, '{"type":"array"}'),
        ({"regex": "a+"}, ConstraintKind.REGEX, "a+"),
        ({"choice": {"choices": ["a", "b"]}}, ConstraintKind.LARK, "start: CHOICE"),
        ({"grammar": 'root ::= "x"'}, ConstraintKind.LARK, 'root ::= "x"'),
    ],
)
async def test_guided_decoding(decoding: dict[str, Any], kind: ConstraintKind, text: str) -> None:
    service = FakeService()
    await generate(service, decoding=decoding)
    found = service.asks[0].params.constraint
    assert found is not None
    assert found.kind is kind
    assert found.text.startswith(text)
    await generate(service, decoding={"format": 0})
    assert service.asks[1].params.constraint is None


DETAILS = {"generated_tokens": True, "token_logprobs": True, "top_n_tokens": 1}


@pytest.mark.parametrize("call", [generate, stream])
async def test_generated_tokens_in_detail(call: Any) -> None:
    service = FakeService(words((" a", "b"), tops=2))
    found = await call(service, response=DETAILS)
    tokens = found.tokens if call is generate else [one for m in found for one in m.tokens]
    # As the vocabulary has them: the ids of the script are those of "+" and ",".
    assert [(token.text, token.logprob) for token in tokens] == [("+", -0.5), (",", -0.5)]
    assert [[top.logprob for top in token.top_tokens] for token in tokens] == [[0], [0]]
    assert (service.asks[0].params.logprobs, service.asks[0].params.top_logprobs) == (True, 1)


async def test_ranks_are_exact_however_unlikely_a_token_is() -> None:
    outs = (TokenOut(7, "a", False, -2.5, rank=3), TokenOut(8, "b", False, -9.0, rank=31_999))
    script: list[Step] = [Chunk(outs, "ab", Finish(Reason.LENGTH, "ab", 2, 2))]
    service = FakeService(script)
    options = {"generated_tokens": True, "token_ranks": True}
    answer = await generate(service, response=options)
    assert [token.rank for token in answer.tokens] == [3, 31_999]
    assert not answer.tokens[0].top_tokens
    assert not answer.tokens[0].logprob
    params = service.asks[0].params
    assert (params.ranks, params.top_logprobs, params.prompt_logprobs) == (True, 0, False)
    await generate(service, response={"input_tokens": True, "token_ranks": True})
    assert service.asks[1].params.ranks
    assert service.asks[1].params.prompt_logprobs
    await generate(service, response={"input_tokens": True, "token_logprobs": True})
    assert not service.asks[2].params.ranks


@pytest.mark.parametrize("call", [generate, stream])
async def test_input_tokens(call: Any) -> None:
    service = FakeService()
    found = await call(service, "a b", response={"input_tokens": True, "input_text": True})
    first = found if call is generate else found[0]
    assert [token.text for token in first.input_tokens] == ["a", "Ġ", "b"]
    assert first.text == ("a b" + TEXT if call is generate else "a b")
    # They are known without the engine.
    assert not service.asks[0].params.prompt_logprobs


@pytest.mark.parametrize("call", [generate, stream])
async def test_input_tokens_in_detail(call: Any) -> None:
    script = words(("a",))
    last = script[-1]
    assert isinstance(last, Chunk)
    assert last.finish is not None
    prompt = (TokenOut(39, "H"), TokenOut(72, "i", logprob=-1.5, top=((72, "i", -1.5),), rank=9))
    script[-1] = replace(last, finish=replace(last.finish, prompt=prompt))
    service = FakeService(script)
    details = {**DETAILS, "input_tokens": True, "token_ranks": True}
    found = await call(service, response=details)
    first = found if call is generate else found[0]
    assert [(token.text, token.logprob) for token in first.input_tokens] == [("H", 0), ("i", -1.5)]
    assert [top.text for top in first.input_tokens[1].top_tokens] == ["i"]
    assert [token.rank for token in first.input_tokens] == [0, 9]
    assert service.asks[0].params.prompt_logprobs
    if call is stream:
        assert [len(message.input_tokens) for message in found[1:]] == [0] * (len(found) - 1)


def ending(reason: Reason, stop: str | None = None) -> list[Step]:
    return [Chunk((TokenOut(10, "x"),), "x", Finish(reason, "x", 2, 1, 0, 77, stop))]


@pytest.mark.parametrize(
    ("reason", "wanted", "code"),
    [
        (Reason.EOS, 5, EOS_TOKEN),
        (Reason.STOP_STRING, 5, foreign.STOP_SEQUENCE),
        (Reason.LENGTH, 2046, MAX_TOKENS),
        (Reason.LENGTH, 2047, foreign.TOKEN_LIMIT),  # of 2048 tokens the input has two
    ],
)
async def test_reasons(reason: Reason, wanted: int, code: int) -> None:
    stop = "x" if reason is Reason.STOP_STRING else None
    service = FakeService(ending(reason, stop))
    for call in (generate, stream):
        found = await call(service, stopping={"max_new_tokens": wanted})
        last = found if call is generate else found[-1]
        assert last.stop_reason == code
        assert last.stop_sequence == (stop or "")
        assert last.seed == 77
    assert service.asks[0].params.max_tokens == min(wanted, 2046)


@pytest.mark.parametrize("call", [generate, stream])
async def test_a_time_limit_ends_an_answer_in_order(call: Any) -> None:
    late = RequestError(Fault.DEADLINE, "the deadline has passed")
    service = FakeService([*words()[:2], late])
    found = await call(service, stopping={"time_limit_millis": 1500}, response=DETAILS)
    last = found if call is generate else found[-1]
    assert service.asks[0].deadline_s == 1.5
    assert last.stop_reason == foreign.TIME_LIMIT
    assert last.generated_token_count == 2
    text = found.text if call is generate else "".join(message.text for message in found)
    assert text == "Once upon"


async def test_the_deadline_of_the_call_is_a_failure() -> None:
    late = RequestError(Fault.DEADLINE, "the deadline has passed")
    async with client_of(FakeService([*words()[:2], late])) as client:
        for params in ({}, {"stopping": {"time_limit_millis": 9_000_000}}):
            for call in (
                client.generate(batch("Hi", params=params), timeout=20),
                client.generate_stream(single("Hi", params=params), timeout=20),
            ):
                assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_failure_is_a_status() -> None:
    service = FakeService([*words()[:1], RequestError(Fault.WORKER_LOST, "gone")])
    async with client_of(service) as client:
        for call in (client.generate(batch("a", "b")), client.generate_stream(single("a"))):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(error)["ErrorInfo"].reason == "WORKER_LOST"
    assert service.open == 0


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"prefix_id": "p"}, grpc.StatusCode.UNIMPLEMENTED, "prefix_id"),
        (
            {"params": {"response": {"token_logprobs": True}}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "params.response",
        ),
        (
            {"params": {"decoding": {"length_penalty": {"decay_factor": 1.5}}}},
            grpc.StatusCode.UNIMPLEMENTED,
            "params.decoding.length_penalty",
        ),
        (
            {"params": {"decoding": {"json_schema": "{"}}},
            grpc.StatusCode.INVALID_ARGUMENT,
            "params.decoding.json_schema",
        ),
    ],
)
async def test_what_is_refused(fields: Any, code: grpc.StatusCode, field: str) -> None:
    service = FakeService()
    async with client_of(service) as client:
        for call in (
            client.generate(batch("a", "b", **fields)),
            client.generate_stream(single("a", **fields)),
        ):
            error = await failure(call)
            assert (error.code(), field_of(error)) == (code, field)
    assert service.asks == []


async def test_faults_from_inside_are_named_as_here() -> None:
    service = FakeService()
    async with client_of(service) as client:
        for inside, outside in (("top_k", "params.sampling.top_k"), ("adapter", "adapter_id")):
            service.refusal = RequestError(Fault.VALIDATION, "no", inside)
            for call in (client.generate(batch("a")), client.generate_stream(single("a"))):
                assert field_of(await failure(call)) == outside
        text = "`inputs` is long, `min_tokens` must be <= `max_new_tokens`, `stop` is too much"
        service.refusal = RequestError(Fault.VALIDATION, text, "prompt")
        for call in (client.generate(batch("a")), client.generate_stream(single("a"))):
            assert (await failure(call)).details() == (
                "`text` is long, `min_new_tokens` must be <= `max_new_tokens`, "
                "`stop_sequences` is too much"
            )


async def test_a_batch_has_a_size() -> None:
    async with client_of(FakeService(), max_concurrent_requests=2) as client:
        assert len((await client.generate(batch("a", "b"))).responses) == 2
        for texts in ((), ("a", "b", "c")):
            error = await failure(client.generate(batch(*texts)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_cancelling_ends_the_requests() -> None:
    for method, request in (("generate", batch("a", "b")), ("generate_stream", single("a"))):
        service = FakeService([asyncio.Event()])
        async with client_of(service) as client, asyncio.timeout(10):
            call = getattr(client, method)(request)
            reading = asyncio.ensure_future(failure(call))
            await service.waiting.wait()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            while service.open:
                await asyncio.sleep(0.001)
            assert service.cancelled == len(service.asks)


async def test_the_only_model_goes_by_any_name() -> None:
    service = FakeService()
    async with client_of(service) as client:
        for name in ("", "m/one", "flan-t5-xl"):
            await client.generate(batch("a", model_id=name, adapter_id="poet"))
        info = await client.model_info(PB["ModelInfoRequest"](model_id="flan-t5-xl"))
    assert [ask.model for ask in service.asks] == ["m/one"] * 3
    assert [ask.adapter for ask in service.asks] == ["poet"] * 3
    assert (info.model_kind, info.max_sequence_length, info.max_new_tokens) == (0, 2048, 2047)


async def test_among_several_models_a_name_must_be_known() -> None:
    class Two(FakeFleet):
        def models(self) -> Any:
            (card,) = super().models()
            return (card, replace(card, id="m/two"))

    service = FakeService()
    service.fleet = Two()
    async with client_of(service) as client:
        error = await failure(client.generate(batch("a", model_id="flan-t5-xl")))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.NOT_FOUND, "model_id")
        error = await failure(client.model_info(PB["ModelInfoRequest"](model_id="flan-t5-xl")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_tokenize() -> None:
    async with client_of(FakeService()) as client:
        texts = [{"text": "a î"}, {"text": "b"}]
        request = PB["BatchedTokenizeRequest"]
        plain = await client.tokenize(request(requests=texts))
        assert [one.token_count for one in plain.responses] == [4, 1]
        assert not plain.responses[0].tokens
        full = await client.tokenize(
            request(requests=texts, return_tokens=True, return_offsets=True)
        )
        first = full.responses[0]
        assert list(first.tokens) == ["a", "Ġ", "Ã", "®"]
        assert [(at.start, at.end) for at in first.offsets] == [(0, 1), (1, 2), (2, 3), (2, 3)]
        cut = await client.tokenize(
            request(requests=texts, return_tokens=True, truncate_input_tokens=2)
        )
        assert [list(one.tokens) for one in cut.responses] == [["Ã", "®"], ["b"]]
        error = await failure(client.tokenize(request(requests=texts, prefix_id="p")))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_key_guards_what_runs_the_model() -> None:
    async with client_of(FakeService(), api_key="Key") as client:
        tokens = PB["BatchedTokenizeRequest"](requests=[{"text": "a"}])
        for method, request in (
            (client.generate, batch("a")),
            (client.generate_stream, single("a")),
            (client.tokenize, tokens),
        ):
            error = await failure(method(request))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer Key"),)
        assert (await client.generate(batch("a"), metadata=metadata)).responses
        assert (await client.model_info(PB["ModelInfoRequest"]())).max_sequence_length


def test_the_enums_have_their_numbers() -> None:
    from router.fmaas.v1 import generation_pb2 as pb

    assert (pb.GREEDY, pb.SAMPLE) == (GREEDY, SAMPLE)
    assert [value.name for value in pb.StopReason.DESCRIPTOR.values] == [
        *("NOT_FINISHED", "MAX_TOKENS", "EOS_TOKEN", "CANCELLED", "TIME_LIMIT"),
        *("STOP_SEQUENCE", "TOKEN_LIMIT", "ERROR"),
    ]
    assert [value.number for value in pb.StopReason.DESCRIPTOR.values] == list(range(8))
