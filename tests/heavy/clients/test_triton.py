"""tritonclient over gRPC: metadata, answers and streams, as Triton's vLLM backend has them."""

import json
import queue
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from tritonclient.grpc import (
    InferenceServerClient,
    InferInput,
    InferRequestedOutput,
    InferResult,
)
from tritonclient.grpc import aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.heavy.clients.world import KEY, PATIENCE_S, PERSON, PERSON_TOKENS, TEMPLATED, TEXTS
from tests.system.server import Server

HEADERS = {"authorization": f"Bearer {KEY}"}
OUTPUT = [InferRequestedOutput("text_output")]


@pytest.fixture
def client(router: Server) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(router.grpc) as client:
        yield client


def inputs(text: str, *, stream: bool = False, **sampling: Any) -> list[InferInput]:
    """The tensors of Triton's vLLM backend: a text, switches, and parameters as JSON."""
    prompt = InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    switch = InferInput("stream", [1], "BOOL")
    switch.set_data_from_numpy(np.array([stream], dtype=bool))
    alone = InferInput("exclude_input_in_output", [1], "BOOL")
    alone.set_data_from_numpy(np.array([True], dtype=bool))
    parameters = InferInput("sampling_parameters", [1], "BYTES")
    raw = json.dumps({"temperature": 0, "max_tokens": 24, **sampling}).encode()
    parameters.set_data_from_numpy(np.array([raw], dtype=np.object_))
    return [prompt, switch, alone, parameters]


def text_of(result: InferResult) -> str:
    (text,) = result.as_numpy("text_output").reshape(-1)
    return text.decode()


def ask(client: InferenceServerClient, router: Server, text: str, **sampling: Any) -> str:
    result = client.infer(
        router.model,
        inputs(text, **sampling),
        outputs=OUTPUT,
        request_id="r1",
        headers=HEADERS,
        client_timeout=PATIENCE_S,
    )
    assert result.get_response().id == "r1"
    return text_of(result)


def test_metadata(client: InferenceServerClient, router: Server) -> None:
    assert client.is_server_live(headers=HEADERS)
    assert client.is_server_ready(headers=HEADERS)
    assert client.is_model_ready(router.model, headers=HEADERS)
    assert not client.is_model_ready("no-such-model", headers=HEADERS)
    about = client.get_server_metadata(headers=HEADERS)
    assert about.name
    assert about.version
    model = client.get_model_metadata(router.model, headers=HEADERS)
    assert model.name == router.model
    tensors = {tensor.name: tensor.datatype for tensor in (*model.inputs, *model.outputs)}
    assert tensors["text_input"] == tensors["text_output"] == "BYTES"
    config = client.get_model_config(router.model, headers=HEADERS)
    assert config.config.name == router.model
    index = client.get_model_repository_index(headers=HEADERS)
    assert [model.name for model in index.models] == [router.model]


def test_statistics(client: InferenceServerClient, router: Server) -> None:
    def counts() -> Any:
        (found,) = client.get_inference_statistics(router.model, headers=HEADERS).model_stats
        assert found.name == router.model
        return found

    before = counts()
    ask(client, router, TEMPLATED)
    after = counts()
    assert after.inference_count == before.inference_count + 1
    assert after.execution_count > before.execution_count + 3
    assert after.last_inference > before.last_inference
    whole = after.inference_stats
    assert whole.success.count == whole.queue.count == after.inference_count
    assert whole.success.ns > before.inference_stats.success.ns
    assert {one.batch_size for one in after.batch_stats} >= {1}
    assert len(client.get_inference_statistics(headers=HEADERS).model_stats) == 1


def test_infer(client: InferenceServerClient, router: Server) -> None:
    answer = ask(client, router, TEMPLATED)
    assert "Paris" in answer
    bare = InferInput("text_input", [1], "BYTES")
    bare.set_data_from_numpy(np.array([TEMPLATED.encode()], dtype=np.object_))
    options = {"max_tokens": 24, "temperature": 0}
    result = client.infer(
        router.model, [bare], headers=HEADERS, parameters=options, client_timeout=PATIENCE_S
    )
    assert text_of(result) == TEMPLATED + answer


def test_constraints(client: InferenceServerClient, router: Server) -> None:
    answer = ask(client, router, "A person:", max_tokens=PERSON_TOKENS, guided_json=PERSON)
    jsonschema.validate(json.loads(answer), PERSON)


@pytest.mark.repeatable
@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken(client: InferenceServerClient, router: Server, text: str) -> None:
    assert ask(client, router, text, max_tokens=4) == ask(client, router, text, max_tokens=4)


def test_streams(client: InferenceServerClient, router: Server) -> None:
    """Two requests on one stream, whose answers carry their ids."""
    whole = ask(client, router, TEMPLATED)
    results: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue(maxsize=1000)
    client.start_stream(lambda result, error: results.put((result, error)), headers=HEADERS)
    for name in ("a", "b"):
        client.async_stream_infer(
            router.model,
            inputs(TEMPLATED, stream=True),
            outputs=OUTPUT,
            request_id=name,
            enable_empty_final_response=True,
        )
    texts, ended = {"a": "", "b": ""}, set()
    while len(ended) < 2:
        result, error = results.get(timeout=PATIENCE_S)
        assert error is None
        assert result is not None
        response = result.get_response()
        if result.as_numpy("text_output") is not None:
            texts[response.id] += text_of(result)
        if response.parameters["triton_final_response"].bool_param:
            ended.add(response.id)
    client.stop_stream()
    assert texts == {"a": whole, "b": whole}


def test_a_failure_leaves_the_stream_open(client: InferenceServerClient, router: Server) -> None:
    results: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue(maxsize=1000)
    client.start_stream(lambda result, error: results.put((result, error)), headers=HEADERS)
    client.async_stream_infer(router.model, inputs("x", temperature=-1.0, stream=True))
    _, error = results.get(timeout=PATIENCE_S)
    assert isinstance(error, InferenceServerException)
    assert "temperature" in str(error)
    client.async_stream_infer(router.model, inputs("x", max_tokens=1, stream=True))
    result, error = results.get(timeout=PATIENCE_S)
    assert error is None
    assert result is not None
    client.stop_stream()


def test_errors(client: InferenceServerClient, router: Server) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, router, "x", temperature=-1)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException) as missing:
        client.infer("no-such-model", inputs("x"), headers=HEADERS)
    assert missing.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException) as denied:
        client.infer(router.model, inputs("x"))
    assert denied.value.status() == "StatusCode.UNAUTHENTICATED"
    odd = InferInput("no_such_tensor", [1], "INT32")
    odd.set_data_from_numpy(np.array([1], dtype=np.int32))
    with pytest.raises(InferenceServerException) as unknown:
        client.infer(router.model, [odd], headers=HEADERS)
    assert unknown.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_asynchronous(router: Server) -> None:
    async with triton_aio.InferenceServerClient(router.grpc) as client:
        result = await client.infer(router.model, inputs(TEMPLATED), headers=HEADERS)
        whole = text_of(result)
        assert "Paris" in whole

        async def requests() -> Any:
            yield {
                "model_name": router.model,
                "inputs": inputs(TEMPLATED, stream=True),
                "outputs": OUTPUT,
            }

        text = ""
        async for part, error in client.stream_infer(requests(), headers=HEADERS):
            assert error is None
            if part.as_numpy("text_output") is not None:
                text += text_of(part)
        assert text == whole
