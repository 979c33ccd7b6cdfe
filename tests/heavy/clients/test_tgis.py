"""``fmaas.GenerationService`` through the stub that vLLM's adapter for TGIS ships.

The package is a server for vLLM; of it only the generated code is loaded.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import jsonschema
import pytest

from tests.heavy.clients.world import (
    KEY,
    LIMIT,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    TEMPLATED,
    TEXTS,
)
from tests.system.server import Server

HEADERS = (("authorization", f"Bearer {KEY}"),)


def generated(name: str) -> Any:
    """A module of the package's generated code, without its server, which needs vLLM."""
    above = "vllm_tgis_adapter.grpc"
    if above not in sys.modules:
        (folder,) = importlib.import_module("vllm_tgis_adapter").__path__
        stand_in = ModuleType(above)
        stand_in.__path__ = [str(Path(folder) / "grpc")]
        sys.modules[above] = stand_in
    return importlib.import_module(f"{above}.pb.{name}")


pb = generated("generation_pb2")
GREEDY, SAMPLE = pb.DecodingMethod.GREEDY, pb.DecodingMethod.SAMPLE


@pytest.fixture
def stub(router: Server) -> Iterator[Any]:
    with grpc.insecure_channel(router.grpc) as channel:
        yield generated("generation_pb2_grpc").GenerationServiceStub(channel)


def params(tokens: int, **fields: Any) -> Any:
    return pb.Parameters(method=GREEDY, stopping={"max_new_tokens": tokens}, **fields)


def generate(stub: Any, texts: list[str], given: Any) -> list[Any]:
    request = pb.BatchedGenerationRequest(
        model_id="tgis", requests=[{"text": text} for text in texts], params=given
    )
    answer = stub.Generate(request, metadata=HEADERS, timeout=PATIENCE_S)
    assert len(answer.responses) == len(texts)
    return list(answer.responses)


def stream(stub: Any, text: str, given: Any) -> list[Any]:
    request = pb.SingleGenerationRequest(model_id="tgis", request={"text": text}, params=given)
    return list(stub.GenerateStream(request, metadata=HEADERS, timeout=PATIENCE_S))


def test_batches_and_streams(stub: Any) -> None:
    whole, other = generate(stub, [TEMPLATED, "Once upon a time"], params(24))
    assert "Paris" in whole.text
    assert whole.stop_reason == pb.StopReason.EOS_TOKEN
    assert other.stop_reason == pb.StopReason.MAX_TOKENS
    assert other.generated_token_count == 24
    messages = stream(stub, TEMPLATED, params(24))
    assert len(messages) > 3
    assert "".join(message.text for message in messages) == whole.text
    assert messages[0].input_token_count == whole.input_token_count > 5
    assert messages[-1].generated_token_count == whole.generated_token_count
    assert messages[-1].stop_reason == pb.StopReason.EOS_TOKEN
    assert {message.stop_reason for message in messages[:-1]} == {pb.StopReason.NOT_FINISHED}


def test_tokens_in_detail(stub: Any) -> None:
    options = {"input_text": True, "generated_tokens": True, "token_logprobs": True}
    given = params(6, response={**options, "input_tokens": True, "top_n_tokens": 2})
    (answer,) = generate(stub, ["One two three"], given)
    assert answer.text.startswith("One two three")
    assert len(answer.tokens) == answer.generated_token_count == 6
    assert len(answer.input_tokens) == answer.input_token_count
    for token in answer.tokens:
        assert token.text
        assert token.logprob <= 0
        assert len(token.top_tokens) >= 2
    assert all(token.logprob <= 0 for token in answer.input_tokens)


@pytest.mark.repeatable
def test_sampling_and_seeds(stub: Any) -> None:
    given = pb.Parameters(
        method=SAMPLE,
        sampling={"temperature": 1.2, "top_k": 50, "top_p": 0.9, "typical_p": 0.9, "seed": 5},
        stopping={"max_new_tokens": 8, "min_new_tokens": 2},
        decoding={"repetition_penalty": 1.1},
        truncate_input_tokens=64,
    )
    first, again = generate(stub, ["Once upon", "Once upon"], given)
    assert first.text == again.text
    assert first.seed == again.seed == 5


def test_stop_sequences(stub: Any) -> None:
    for kept in (True, False):
        stopping = {"max_new_tokens": 24, "stop_sequences": ["Paris"]}
        given = pb.Parameters(stopping={**stopping, "include_stop_sequence": kept})
        (answer,) = generate(stub, [TEMPLATED], given)
        assert answer.stop_reason == pb.StopReason.STOP_SEQUENCE
        assert answer.stop_sequence == "Paris"
        assert answer.text.endswith("Paris") is kept


def test_a_time_limit_is_an_end(stub: Any) -> None:
    stopping = {"max_new_tokens": 900, "min_new_tokens": 900, "time_limit_millis": 300}
    (answer,) = generate(stub, ["Once"], pb.Parameters(stopping=stopping))
    assert answer.stop_reason == pb.StopReason.TIME_LIMIT
    assert answer.generated_token_count < 900


def test_guided_decoding(stub: Any) -> None:
    schema = params(PERSON_TOKENS, decoding={"json_schema": json.dumps(PERSON)})
    (answer,) = generate(stub, ["A person:"], schema)
    jsonschema.validate(json.loads(answer.text), PERSON)
    pattern = r"\d{3}-[a-c]{4}"
    (answer,) = generate(stub, ["A code:"], params(20, decoding={"regex": pattern}))
    assert re.fullmatch(pattern, answer.text)
    choices = ["tea", "black coffee"]
    (answer,) = generate(stub, ["I like"], params(20, decoding={"choice": {"choices": choices}}))
    assert answer.text in choices
    grammar = 'root ::= "yes" | "no"'
    (answer,) = generate(stub, ["Is it?"], params(20, decoding={"grammar": grammar}))
    assert answer.text in ("yes", "no")


def test_tokenize_and_model_info(stub: Any) -> None:
    request = pb.BatchedTokenizeRequest(
        model_id="tgis",
        requests=[{"text": "One two"}, {"text": "日本"}],
        return_tokens=True,
        return_offsets=True,
    )
    answer = stub.Tokenize(request, metadata=HEADERS, timeout=PATIENCE_S)
    for text, one in zip(("One two", "日本"), answer.responses, strict=True):
        assert one.token_count == len(one.tokens) == len(one.offsets)
        assert one.offsets[-1].end == len(text)
    info = stub.ModelInfo(pb.ModelInfoRequest(model_id="tgis"), metadata=HEADERS)
    assert info.max_sequence_length == LIMIT
    assert info.model_kind == pb.ModelInfoResponse.ModelKind.DECODER_ONLY


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(stub: Any, text: str) -> None:
    (answer,) = generate(stub, [text], params(2, response={"input_text": True}))
    assert answer.text.startswith(text)


def test_errors(stub: Any) -> None:
    for given in (
        pb.Parameters(method=SAMPLE, sampling={"temperature": -1.0}),
        pb.Parameters(stopping={"min_new_tokens": 9, "max_new_tokens": 3}),
        params(4, decoding={"json_schema": '{"type": "no such type"}'}),
        params(4, decoding={"regex": "("}),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            generate(stub, ["x"], given)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as streamed:
            stream(stub, "x", given)
        assert streamed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as denied:
        stub.Generate(pb.BatchedGenerationRequest(requests=[{"text": "x"}]), timeout=PATIENCE_S)
    assert denied.value.code() is grpc.StatusCode.UNAUTHENTICATED
