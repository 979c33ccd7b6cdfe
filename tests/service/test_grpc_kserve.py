"""``inference.GRPCInferenceService``, called with messages that know its numbers only."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from router.core.events import Reason
from router.errors import Fault, RequestError
from tests.service.fake_service import FakeService, words
from tests.service.grpc_rig import channel_of, details_of, failure, field_of, read
from tests.service.kserve_rig import (
    PATH,
    PB,
    client_of,
    final,
    outputs_of,
    parameters,
    raw_request,
)

TEXT = "Once upon a tîme 🙂"
ABSENT = (
    *("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"),
    *("SystemSharedMemoryStatus", "CudaSharedMemoryRegister"),
)


async def test_prompts_are_answered_in_their_shape() -> None:
    service = FakeService(words(("a",)), words(("b",)))
    async with client_of(service) as client:
        answer = await client.infer(raw_request("x", "y", id="7", model_name="m/one"))
        assert (answer.id, answer.model_name, answer.model_version) == ("7", "m/one", "1")
        assert outputs_of(answer) == {"text_output": ["xa", "yb"]}
        assert list(answer.outputs[0].shape) == [2]
        assert not answer.parameters
        request = raw_request("x", "y")
        request.inputs[0].shape[:] = [2, 1]
        assert list((await client.infer(request)).outputs[0].shape) == [2, 1]
    assert [ask.prompt for ask in service.asks[:2]] == ["x", "y"]


async def test_typed_lists_are_answered_with_typed_lists() -> None:
    request = PB["ModelInferRequest"](
        inputs=[
            {
                "name": "text_input",
                "datatype": "BYTES",
                "shape": [1],
                "contents": {"bytes_contents": ["tîme".encode()]},
            },
            {
                "name": "max_tokens",
                "datatype": "INT32",
                "shape": [1],
                "contents": {"int_contents": [5]},
            },
            {
                "name": "return_num_input_tokens",
                "datatype": "BOOL",
                "shape": [1],
                "contents": {"bool_contents": [True]},
            },
        ]
    )
    service = FakeService()
    async with client_of(service) as client:
        answer = await client.infer(request)
    text, count = answer.outputs
    assert [one.decode() for one in text.contents.bytes_contents] == [f"tîme{TEXT}"]
    assert list(count.contents.uint_contents) == [7]
    assert not answer.raw_output_contents
    assert (service.asks[0].prompt, service.asks[0].params.max_tokens) == ("tîme", 5)


async def test_what_there_is_to_know_of_an_answer() -> None:
    service = FakeService(words(("a", "b"), Reason.EOS, tops=1), words(("c",), tops=1))
    flags = dict.fromkeys(
        (
            *("return_finish_reason", "return_cumulative_logprob", "return_logprobs"),
            *("return_num_input_tokens", "return_num_output_tokens", "return_log_probs"),
        ),
        ("BOOL", [True]),
    )
    async with client_of(service) as client:
        request = raw_request("x", "y", inputs=flags, parameters=parameters(logprobs=1))
        found = outputs_of(await client.infer(request))
    assert found["text_output"] == ["xab", "yc"]
    assert found["finish_reason"] == ["stop", "length"]
    assert found["cumulative_logprob"] == found["cum_log_probs"] == [-1.0, -0.5]
    assert found["num_input_tokens"] == [7, 7]
    assert found["num_output_tokens"] == [2, 1]
    assert found["output_log_probs"] == [-0.5, -0.5, -0.5, 0.0]  # rows as long as the longest
    first, _ = found["logprobs"]
    assert '"90":{"logprob":-0.0,"rank":1,"decoded_token":"t0"}' in first
    assert '"10":{"logprob":-0.5,"rank":null,"decoded_token":"a"}' in first
    params = service.asks[0].params
    assert (params.logprobs, params.top_logprobs) == (True, 1)


async def test_listed_outputs_alone_are_sent() -> None:
    service = FakeService()
    async with client_of(service) as client:
        wanted = [{"name": "num_output_tokens"}, {"name": "text_output"}]
        found = outputs_of(await client.infer(raw_request("x", outputs=wanted)))
        assert found == {"num_output_tokens": [5], "text_output": [f"x{TEXT}"]}
        error = await failure(client.infer(raw_request("x", outputs=[{"name": "logits"}])))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "outputs")


async def test_the_input_is_before_an_answer_unless_it_streams_or_is_excluded() -> None:
    async with client_of(FakeService()) as client:
        for fields, begin in (
            ({}, "Hi: "),
            ({"exclude_input_in_output": False}, "Hi: "),
            ({"exclude_input_in_output": True}, ""),
        ):
            request = raw_request("Hi: ", parameters=parameters(**fields))
            assert outputs_of(await client.infer(request))["text_output"] == [f"{begin}{TEXT}"]
            request = raw_request("Hi: ", parameters=parameters(stream=True, **fields))
            messages = await read(client.stream(iter([request])))
            pieces = [outputs_of(one.infer_response)["text_output"][0] for one in messages]
            assert "".join(pieces) == (f"{begin}{TEXT}" if fields and begin else TEXT)


async def test_a_stream_carries_several_requests() -> None:
    service = FakeService(words(), words(("x",)))
    switch = {"stream": ("BOOL", [True])}
    async with client_of(service) as client:

        async def requests() -> AsyncIterator[Any]:
            yield raw_request("one", inputs=switch, id="a")
            yield raw_request("two", id="b")
            yield raw_request("three", id="c", model_name="nope")

        texts: dict[str, list[str]] = {"a": [], "b": []}
        ends, errors = [], {}
        async for message in client.stream(requests()):
            answer = message.infer_response
            if final(answer):
                ends.append(answer.id)
            if message.error_message:
                errors[answer.id] = message.error_message
            else:
                texts[answer.id] += outputs_of(answer)["text_output"]
    assert texts == {"a": ["Once", " upon", " a", " tîme", " 🙂"], "b": ["twox"]}
    assert sorted(ends) == ["a", "b", "c"]
    assert list(errors) == ["c"]
    assert "nope" in errors["c"]


async def test_pieces_of_a_stream_say_what_is_asked_for() -> None:
    flags = dict.fromkeys(("return_finish_reason", "return_num_output_tokens"), ("BOOL", [True]))
    given = parameters(stream=True, exclude_input_in_output=False, return_cumulative_logprob=True)
    async with client_of(FakeService(words(("a", "b")))) as client:
        request = raw_request("Hi ", inputs=flags, parameters=given)
        messages = [one.infer_response async for one in client.stream(iter([request]))]
    found = [outputs_of(message) for message in messages]
    assert [one["text_output"] for one in found] == [["Hi a"], ["b"]]
    assert [one["finish_reason"] for one in found] == [["None"], ["length"]]
    assert [one["num_output_tokens"] for one in found] == [[1], [1]]
    assert [one["cumulative_logprob"] for one in found] == [[-0.5], [-1.0]]


async def test_a_failure_leaves_the_stream_open() -> None:
    broken = [*words()[:1], RequestError(Fault.WORKER_LOST, "gone")]
    service = FakeService(broken, words(("x",)))
    switch = {"stream": ("BOOL", [True])}
    async with client_of(service) as client, asyncio.timeout(10):
        call = client.stream()
        await call.write(raw_request("one", inputs=switch, id="a"))
        first, second = await call.read(), await call.read()
        assert not final(first.infer_response)
        assert (second.error_message, second.infer_response.id) == ("gone", "a")
        assert final(second.infer_response)
        await call.write(raw_request("two", id="b"))
        assert (await call.read()).infer_response.id == "b"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_bug_is_told_in_the_stream_without_its_text() -> None:
    service = FakeService()
    service.refusal = ZeroDivisionError("secret")
    async with client_of(service) as client:
        (message,) = [one async for one in client.stream(iter([raw_request("x")]))]
    assert message.error_message
    assert "secret" not in message.error_message


async def test_cancelling_a_stream_ends_its_requests() -> None:
    service = FakeService([asyncio.Event()])
    async with client_of(service) as client, asyncio.timeout(10):
        call = client.stream()
        for _ in range(3):
            await call.write(raw_request("x"))
        while service.open < 3:
            await asyncio.sleep(0.001)
        call.cancel()
        while service.open:
            await asyncio.sleep(0.001)
    assert service.cancelled == 3


async def test_cancelling_a_call_ends_its_requests() -> None:
    service = FakeService([asyncio.Event()])
    async with client_of(service) as client, asyncio.timeout(10):
        call = client.infer(raw_request("x", "y"))
        while service.open < 2:
            await asyncio.sleep(0.001)
        call.cancel()
        while service.open:
            await asyncio.sleep(0.001)
    assert service.cancelled == 2


async def test_deadlines_reach_the_asks() -> None:
    service = FakeService()
    async with client_of(service) as client:
        await client.infer(raw_request("x"))
        await client.infer(raw_request("x", parameters=parameters(timeout=1_500_000)))
        await client.infer(raw_request("x", parameters=parameters(timeout=90_000_000)), timeout=20)
    first, second, third = (ask.deadline_s for ask in service.asks)
    assert first is None
    assert second == 1.5
    assert third is not None
    assert 0 < third < 21


async def test_errors_of_a_call_are_statuses() -> None:
    service = FakeService()
    async with client_of(service) as client:
        error = await failure(client.infer(raw_request("x", model_name="nope")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        error = await failure(client.infer(raw_request("x", model_version="2")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        error = await failure(client.infer(raw_request("x", parameters=parameters(stream=True))))
        assert (error.code(), field_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "stream")
        given = raw_request("x", "y", parameters=parameters(stream=True))
        (message,) = [one async for one in client.stream(iter([given]))]
        assert "one prompt" in message.error_message
        service.refusal = RequestError(Fault.VALIDATION, "no", "adapter")
        for texts in (("x",), ("x", "y")):
            assert field_of(await failure(client.infer(raw_request(*texts)))) == "lora_name"
        text = "`inputs` tokens + `max_new_tokens` is too much; so is `adapter_id`"
        service.refusal = RequestError(Fault.VALIDATION, text, "prompt")
        ours = "`text_input` tokens + `max_tokens` is too much; so is `lora_name`"
        assert (await failure(client.infer(raw_request("x")))).details() == ours
        for streams in (False, True):
            given = raw_request("x", parameters=parameters(stream=streams))
            (message,) = [one async for one in client.stream(iter([given]))]
            assert message.error_message == ours
        service.refusal = RequestError(Fault.OVERLOADED, "full")
        error = await failure(client.infer(raw_request("x", "y")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details_of(error)["ErrorInfo"].reason == "OVERLOADED"
    assert service.asks == []


async def test_the_server_and_its_models() -> None:
    service = FakeService()
    async with client_of(service, api_key="Key") as client:
        named = PB["Named"]
        assert (await client.ask("ServerLive", "ServerLiveResponse")).live
        assert (await client.ask("ServerReady", "ServerReadyResponse")).ready
        for name, version, ready in (("m/one", "", True), ("", "1", True), ("nope", "", False)):
            request = named(name=name, version=version)
            answer = await client.ask("ModelReady", "ModelReadyResponse", request)
            assert answer.ready is ready
        about = await client.ask("ServerMetadata", "ServerMetadataResponse")
        assert about.name == "roundhouse"
        assert about.version
        request = named(name="m/one")
        model = await client.ask("ModelMetadata", "ModelMetadataResponse", request)
        assert (model.name, list(model.versions), model.platform) == ("m/one", ["1"], "scripted")
        inputs = {one.name: (one.datatype, list(one.shape)) for one in model.inputs}
        assert inputs["text_input"] == ("BYTES", [-1])
        assert inputs["stream"] == ("BOOL", [-1])
        assert model.outputs[0].name == "text_output"
        config = (await client.ask("ModelConfig", "ModelConfigResponse", request)).config
        assert (config.name, config.max_batch_size) == ("m/one", 0)
        assert config.model_transaction_policy.decoupled
        assert (config.input[0].name, config.input[0].data_type) == ("text_input", 13)
        assert not config.input[0].optional
        assert all(one.optional for one in config.input[1:])
        limits = {entry.key: entry.value.string_value for entry in config.parameters}
        assert limits["max_total_tokens"] == "2048"
        for name in ("m/one", ""):
            request = named(name=name)
            found = await client.ask("ModelStatistics", "ModelStatisticsResponse", request)
            assert [(one.name, one.inference_count) for one in found.model_stats] == [("m/one", 0)]
        error = await failure(client.ask("ModelStatistics", "Nothing", named(name="nope")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        request = PB["RepositoryIndexRequest"]()
        index = await client.ask("RepositoryIndex", "RepositoryIndexResponse", request)
        assert [(one.name, one.version, one.state) for one in index.models] == [
            ("m/one", "1", "READY")
        ]


async def test_models_without_workers_are_not_ready() -> None:
    service = FakeService()
    async with client_of(service) as client:
        assert service.fleet is not None
        service.fleet.up = False
        assert not (await client.ask("ServerReady", "ServerReadyResponse")).ready
        request = PB["Named"](name="m/one")
        assert not (await client.ask("ModelReady", "ModelReadyResponse", request)).ready
        all_of_them, ready = (
            PB["RepositoryIndexRequest"](),
            PB["RepositoryIndexRequest"](ready=True),
        )
        index = await client.ask("RepositoryIndex", "RepositoryIndexResponse", all_of_them)
        assert [one.state for one in index.models] == ["UNAVAILABLE"]
        index = await client.ask("RepositoryIndex", "RepositoryIndexResponse", ready)
        assert not index.models


async def test_what_triton_has_beside_is_refused_by_name() -> None:
    async with client_of(FakeService()) as client:
        for name in ABSENT:
            error = await failure(client.ask(name, "Nothing"))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert name in (error.details() or "")


async def nothing_until(over: asyncio.Event) -> AsyncIterator[Any]:
    await over.wait()
    for request in ():
        yield request


async def test_the_key_guards_what_runs_the_model() -> None:
    async with client_of(FakeService(), api_key="Key") as client:
        over = asyncio.Event()
        # Nothing is written: grpc says INTERNAL of a call that is refused while it is written to.
        for call in (client.infer(raw_request("x")), client.stream(nothing_until(over))):
            assert (await failure(call)).code() is grpc.StatusCode.UNAUTHENTICATED
        over.set()
        metadata = (("authorization", "Bearer Key"),)
        assert (await client.infer(raw_request("x"), metadata=metadata)).outputs
        messages = client.stream(iter([raw_request("x")]), metadata=metadata)
        assert (await read(messages))[0].infer_response.outputs


async def test_bytes_that_are_no_request_end_the_stream() -> None:
    async with channel_of(FakeService()) as channel:
        call = channel.stream_stream(f"{PATH}/ModelStreamInfer")(iter([b"\xff\xff"]))
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
