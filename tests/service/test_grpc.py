import asyncio
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.api import grpc_health, grpc_server
from router.ask import Chunk, Finish, TokenOut
from router.config import Settings
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.faces import _free_port
from router.v1 import router_pb2 as pb
from tests.service.fake_service import FakeFleet, FakeService, Step, words
from tests.service.grpc_rig import Stub, address_of, channel_of, details_of, failure, stub_of

TEXT = "Once upon a tîme 🙂"
SERVICES = ("router.v1.Inference", "fmaas.GenerationService", "inference.GRPCInferenceService")


async def generate(service: FakeService, **fields: Any) -> list[pb.GenerateResponse]:
    async with stub_of(service) as stub:
        return [message async for message in stub.Generate(pb.GenerateRequest(**fields))]


async def test_generate_streams_tokens_text_and_the_end() -> None:
    service = FakeService(words(reason=Reason.EOS, seed=5))
    messages = await generate(service, text="Hi", parameters={"temperature": 0.5})
    assert "".join(message.text for message in messages) == TEXT
    assert [list(message.token_ids) for message in messages] == [[10], [11], [12], [13], [14]]
    assert all(not message.HasField("finish") for message in messages[:-1])
    assert messages[-1].finish == pb.Finish(
        reason=pb.FINISH_REASON_EOS_TOKEN,
        prompt_tokens=7,
        generated_tokens=5,
        cached_tokens=2,
        seed=5,
    )
    assert all(not message.logprobs for message in messages)
    assert service.asks[0].prompt == "Hi"
    assert service.asks[0].params.temperature == 0.5
    assert service.asks[0].deadline_s is None


async def test_parameters_unset_are_neutral_and_set_ones_arrive() -> None:
    service = FakeService()
    await generate(service, text="x")
    params = service.asks[0].params
    assert (params.temperature, params.top_p, params.typical_p) == (1.0, 1.0, 1.0)
    assert (params.max_tokens, params.seed, params.repetition_penalty) == (None, None, 1.0)
    parameters = pb.Parameters(
        max_tokens=0,
        min_tokens=1,
        temperature=0,
        top_k=3,
        top_p=0.5,
        min_p=0.25,
        typical_p=0.75,
        repetition_penalty=1.5,
        frequency_penalty=-1,
        presence_penalty=2,
        seed=2**64 - 1,
        logit_bias={9: 1.5, 2: -3},
        stop=["a", "b"],
        stop_token_ids=[4],
        ignore_eos=True,
        include_stop=True,
        logprobs=True,
        top_logprobs=2,
        ranks=True,
        watermark=True,
    )
    ids = pb.TokenIds(ids=[1, 2])
    await generate(service, token_ids=ids, parameters=parameters, priority=0, model="tgi")
    ask = service.asks[1]
    params = ask.params
    assert (ask.prompt, ask.priority, ask.model) == ((1, 2), 0, "tgi")
    assert (params.max_tokens, params.min_tokens, params.temperature) == (0, 1, 0)
    assert (params.top_k, params.top_p, params.min_p, params.typical_p) == (3, 0.5, 0.25, 0.75)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.5, -1)
    assert (params.presence_penalty, params.seed) == (2, 2**64 - 1)
    assert params.logit_bias == ((2, -3.0), (9, 1.5))
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (4,))
    assert params.ignore_eos
    assert params.include_stop
    assert params.logprobs
    assert params.top_logprobs == 2
    assert (params.ranks, params.watermark) == (True, True)


async def test_logprobs_run_in_parallel() -> None:
    service = FakeService(words(("a", "b"), tops=2))
    parameters = pb.Parameters(logprobs=True, top_logprobs=2, stream_tokens=2)
    (message,) = await generate(service, text="x", parameters=parameters)
    assert list(message.logprobs) == [-0.5, -0.5]
    assert [list(top.token_ids) for top in message.top_logprobs] == [[90, 91]] * 2
    assert [list(top.logprobs) for top in message.top_logprobs] == [[0, -1]] * 2


async def test_ranks_are_told_where_they_were_asked_for() -> None:
    first = Chunk((TokenOut(4, "a", rank=1), TokenOut(5, "b", rank=40_000)), "ab")
    prompt = (TokenOut(1, "x"), TokenOut(2, "y", logprob=-1.0, rank=7))
    finish = Finish(Reason.LENGTH, "abc", 2, 3, prompt=prompt)
    script: list[Step] = [first, Chunk((TokenOut(6, "c", rank=3),), "c", finish)]
    asked = pb.Parameters(ranks=True)
    one, two = await generate(FakeService(script), text="x", parameters=asked)
    assert (list(one.ranks), list(two.ranks)) == ([1, 40_000], [3])
    assert not one.logprobs
    assert [token.HasField("rank") for token in two.finish.prompt] == [False, True]
    assert two.finish.prompt[1].rank == 7
    (whole,) = await generate(
        FakeService(script), text="x", parameters=pb.Parameters(stream_tokens=9)
    )
    assert not whole.ranks


@pytest.mark.parametrize(("least", "sizes"), [(0, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
async def test_stream_tokens_collects(least: int, sizes: list[int]) -> None:
    messages = await generate(FakeService(), text="x", parameters={"stream_tokens": least})
    assert [len(message.token_ids) for message in messages] == sizes
    assert "".join(message.text for message in messages) == TEXT
    assert messages[-1].HasField("finish")


async def test_what_was_collected_is_sent_before_a_failure() -> None:
    service = FakeService([*words()[:3], RequestError(Fault.WORKER_LOST, "gone")])
    async with stub_of(service) as stub:
        request = pb.GenerateRequest(text="x", parameters={"stream_tokens": 2})
        call = stub.Generate(request)
        assert [len((await call.read()).token_ids) for _ in range(2)] == [2, 1]
        error = await failure(call.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(error)["ErrorInfo"].reason == "WORKER_LOST"


async def test_a_chunk_of_many_tokens_is_one_message() -> None:
    outs = tuple(TokenOut(i, "w") for i in range(3))
    service = FakeService([Chunk(outs, "www", Finish(Reason.STOP_STRING, "www", 1, 3, stop="x"))])
    (message,) = await generate(service, text="x")
    assert list(message.token_ids) == [0, 1, 2]
    assert message.finish.stop == "x"
    assert message.finish.reason == pb.FINISH_REASON_STOP_SEQUENCE
    assert not message.finish.HasField("seed")


async def test_chat_uses_the_template() -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        message = {"role": "user", "content": "Hi"}
        request = pb.ChatRequest(messages=[message], parameters={"max_tokens": 4})
        answers = [answer async for answer in stub.Chat(request)]
        assert "".join(answer.text for answer in answers) == TEXT
        (ask,) = service.asks
        assert ask.prompt == "<user>Hi</><assistant>"
        assert not ask.add_special_tokens
        assert ask.params.max_tokens == 4
        bad = pb.ChatRequest(messages=[pb.ChatMessage(role="king", content="x")])
        error = await failure(stub.Chat(bad))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        fields = details_of(error)["BadRequest"].field_violations
        assert [violation.field for violation in fields] == ["messages[0].role"]


async def test_a_conversation_is_tokenised_as_chat_would() -> None:
    service = FakeService()
    async with stub_of(service) as stub:
        request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")])
        answer = await stub.TokenizeChat(request)
        assert answer.text == "<user>Hi</><assistant>"
        assert "".join(token.text for token in answer.tokens) == answer.text
        request.template = "nope"
        error = await failure(stub.TokenizeChat(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        fields = details_of(error)["BadRequest"].field_violations
        assert [violation.field for violation in fields] == ["template"]
    assert service.asks == []


async def test_tokenize_detokenize_and_models() -> None:
    async with stub_of(FakeService()) as stub:
        tokens = (await stub.Tokenize(pb.TokenizeRequest(text="aî"))).tokens
        assert [(token.id, token.start, token.end) for token in tokens] == [
            (64, 0, 1),
            (127, 1, 2),
            (106, 1, 2),
        ]
        ids = [token.id for token in tokens]
        assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "aî"
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert "logprobs" in model.features
        assert (model.id, model.max_total_tokens, model.max_input_tokens) == ("m/one", 2048, 2047)
        (group,) = model.groups
        assert (group.name, group.engine, group.device, group.world) == ("g0", "scripted", "cpu", 1)
        assert group.ready


@pytest.mark.parametrize(
    ("fault", "code", "retry"),
    [
        (Fault.VALIDATION, grpc.StatusCode.INVALID_ARGUMENT, None),
        (Fault.UNSUPPORTED, grpc.StatusCode.UNIMPLEMENTED, None),
        (Fault.OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (Fault.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, 2),
        (Fault.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED, 1),
        (Fault.ENGINE_FAILED, grpc.StatusCode.INTERNAL, None),
    ],
)
async def test_errors_carry_details(fault: Fault, code: grpc.StatusCode, retry: int | None) -> None:
    service = FakeService()
    service.refusal = RequestError(fault, "bécause", "max_tokens")
    async with stub_of(service) as stub:
        error = await failure(stub.Generate(pb.GenerateRequest(text="x")))
    assert error.code() is code
    assert error.details() == "bécause"
    details = details_of(error)
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (fault.value, "roundhouse")
    (violation,) = details["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("max_tokens", "bécause")
    assert ("RetryInfo" in details) == (retry is not None)
    if retry is not None:
        assert details["RetryInfo"].retry_delay.seconds == retry


async def test_bad_requests_are_invalid_arguments() -> None:
    service = FakeService()
    async with channel_of(service) as channel:
        for raw in (b"\xff\xff\xff", b"\x12\x02\xff\xfe", b"\x12\x7f"):
            call = channel.unary_stream("/router.v1.Inference/Generate")(raw)
            assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        error = await failure(Stub(channel).Generate(pb.GenerateRequest()))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = await failure(Stub(channel).Generate(pb.GenerateRequest(text="x", model="nope")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        unknown = channel.unary_unary("/router.v1.Inference/Nothing")(b"")
        assert (await failure(unknown)).code() is grpc.StatusCode.UNIMPLEMENTED
    assert service.asks == []


async def test_a_bug_is_internal_and_tells_nothing() -> None:
    service = FakeService()
    service.refusal = ZeroDivisionError("secret")
    async with stub_of(service) as stub:
        error = await failure(stub.Generate(pb.GenerateRequest(text="x")))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")


async def test_messages_over_the_limit_are_refused() -> None:
    async with stub_of(FakeService(), payload_limit=1000) as stub:
        error = await failure(stub.Generate(pb.GenerateRequest(text="x" * 1001)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [m async for m in stub.Generate(pb.GenerateRequest(text="x" * 900))]


async def test_the_key_guards_what_runs_the_model() -> None:
    async with stub_of(FakeService(), api_key="Key") as stub:
        requests = (
            (stub.Generate, pb.GenerateRequest(text="x")),
            (stub.Chat, pb.ChatRequest(messages=[pb.ChatMessage(role="user")])),
            (stub.Tokenize, pb.TokenizeRequest(text="x")),
            (stub.TokenizeChat, pb.ChatRequest(messages=[pb.ChatMessage(role="user")])),
            (stub.Detokenize, pb.DetokenizeRequest(token_ids=[1])),
        )
        for method, request in requests:
            for metadata in ((), (("authorization", "Bearer key"),)):
                error = await failure(method(request, metadata=metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer Key"),)
        assert (await stub.Tokenize(pb.TokenizeRequest(text="x"), metadata=metadata)).tokens
        assert (await stub.ListModels(pb.ListModelsRequest())).models


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("least", [1, 100])
async def test_cancelling_a_call_cancels_its_request(begun: bool, least: int) -> None:
    service = FakeService([*(words()[:2] if begun else ()), asyncio.Event()])
    async with stub_of(service) as stub, asyncio.timeout(10):
        request = pb.GenerateRequest(text="x", parameters={"stream_tokens": least})
        call = stub.Generate(request)
        reading = asyncio.ensure_future(failure(call))
        await service.waiting.wait()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await service.left.wait()
        assert (service.open, service.cancelled) == (0, 1)


async def test_deadlines_reach_the_ask_and_end_the_call() -> None:
    service = FakeService([asyncio.Event()])
    async with stub_of(service) as stub, asyncio.timeout(10):
        error = await failure(stub.Generate(pb.GenerateRequest(text="x"), timeout=1.0))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await service.left.wait()
    (ask,) = service.asks
    assert ask.deadline_s is not None
    assert 0 < ask.deadline_s < 1.01


async def test_health_follows_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "POLL_S", 0.01)
    service = FakeService()
    service.fleet = FakeFleet()
    service.fleet.known = False
    states = health_pb2.HealthCheckResponse
    async with channel_of(service) as channel, asyncio.timeout(10):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", *SERVICES):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request)).status == states.NOT_SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == states.NOT_SERVING
        service.fleet.known = True
        assert (await watch.read()).status == states.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == states.SERVING
        watch.cancel()
        error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nope")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services() -> None:
    async with channel_of(FakeService()) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        asked += [
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in SERVICES
        ]
        call = stub.ServerReflectionInfo(iter(asked))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {*SERVICES, "grpc.health.v1.Health"} <= names
        for _ in SERVICES:
            assert (await call.read()).file_descriptor_response.file_descriptor_proto
        call.cancel()


async def test_reflection_finds_whatever_has_a_name() -> None:
    """As ``grpcurl describe`` asks: services, methods, messages and their fields."""
    service = "router.v1.Inference"
    found = (f"{service}.Generate", "router.v1.GenerateRequest", "router.v1.GenerateRequest.text")
    missing = (f"{service}.Nothing", "router.v1.Nothing.Generate", "nothing")
    async with channel_of(FakeService()) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
            for name in (*found, *missing)
        )
        answers = [await call.read() for _ in (*found, *missing)]
        call.cancel()
    for answer in answers[: len(found)]:
        listed = answer.file_descriptor_response.file_descriptor_proto
        files = [FileDescriptorProto.FromString(data) for data in listed]
        named = {f"{file.package}.{one.name}" for file in files for one in file.service}
        assert service in named
    for answer in answers[len(found) :]:
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_clients_may_ping_to_learn_whether_the_router_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_server, "PING_INTERVAL_MS", 1)
    async with address_of(FakeService()) as address, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        settings = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        for number in range(10):  # after the third one too many grpc says GOAWAY
            ping = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + number.to_bytes(8)
            writer.write(ping)
            kind, payload = 0, b""
            while kind != 6:
                head = await reader.readexactly(9)
                kind, payload = head[3], await reader.readexactly(int.from_bytes(head[:3]))
                assert kind != 7, payload
            assert payload == number.to_bytes(8)
            await asyncio.sleep(0.01)  # longer than the interval that is allowed
        writer.close()
        await writer.wait_closed()


async def test_a_taken_port_is_one_line() -> None:
    service = FakeService()
    async with channel_of(service):
        pass
    settings = Settings(host="127.0.0.1", grpc_port=_free_port("127.0.0.1"))
    fleet = FakeFleet()
    first = await grpc_server.start(service, fleet, settings)  # type: ignore[arg-type]
    try:
        with pytest.raises(OSError, match=str(settings.grpc_port)):
            await grpc_server.start(service, fleet, settings)  # type: ignore[arg-type]
    finally:
        await first.stop(0)
