"""A client that knows nothing beforehand, as grpcurl does: it asks the server what it offers."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.heavy.clients.world import (
    ABOUT,
    KEY,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    QUESTION,
    SCHEMAS,
    TEMPLATED,
    TOOL_TOKENS,
)
from tests.system.server import Server

HEADERS = (("authorization", f"Bearer {KEY}"),)
INFERENCE = "router.v1.Inference"
SERVICES = {
    INFERENCE,
    "fmaas.GenerationService",
    "inference.GRPCInferenceService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}
GREEDY = {"maxTokens": 24, "temperature": 0}


class Caller:
    """Calls methods with JSON, by the descriptors that the server hands out."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = descriptor_pool.DescriptorPool(self.database)

    def service(self, name: str) -> ServiceDescriptor:
        return self._pool.FindServiceByName(name)

    def __call__(self, service: str, method: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers, one for a method that does not stream."""
        found = self.service(service).methods_by_name[method]
        request = message_factory.GetMessageClass(found.input_type)()
        json_format.ParseDict(body, request)
        answer = message_factory.GetMessageClass(found.output_type)
        make = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        call = make(  # type: ignore[operator]
            f"/{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        got = call(request, metadata=HEADERS, timeout=PATIENCE_S)
        return [
            json_format.MessageToDict(one) for one in (got if found.server_streaming else [got])
        ]


@pytest.fixture
def call(router: Server) -> Iterator[Caller]:
    with grpc.insecure_channel(router.grpc) as channel:
        yield Caller(channel)


def test_every_service_can_be_described(call: Caller) -> None:
    assert set(call.database.get_services()) >= SERVICES
    for name in call.database.get_services():
        assert call.service(name).methods


def test_health(call: Caller) -> None:
    for name in ("", *SERVICES - {"grpc.health.v1.Health"}):
        if "reflection" not in name:
            (answer,) = call("grpc.health.v1.Health", "Check", {"service": name})
            assert answer == {"status": "SERVING"}


def test_generate(call: Caller) -> None:
    answers = call(INFERENCE, "Generate", {"text": TEMPLATED, "parameters": GREEDY})
    assert "Paris" in "".join(answer.get("text", "") for answer in answers)
    finish = answers[-1]["finish"]
    assert finish["reason"] == "FINISH_REASON_EOS_TOKEN"
    counted = sum(len(answer.get("tokenIds", ())) for answer in answers)
    assert finish["generatedTokens"] == counted


def test_constraints(call: Caller) -> None:
    schema = {"jsonSchema": json.dumps(PERSON)}
    parameters = {**GREEDY, "maxTokens": PERSON_TOKENS, "constraint": schema}
    answers = call(INFERENCE, "Generate", {"text": "A person:", "parameters": parameters})
    text = "".join(answer.get("text", "") for answer in answers)
    jsonschema.validate(json.loads(text), PERSON)


def test_chat_with_a_forced_tool(call: Caller) -> None:
    tools = [
        {"name": name, "description": ABOUT[name], "parameters": json.dumps(schema)}
        for name, schema in SCHEMAS.items()
    ]
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "parameters": {**GREEDY, "maxTokens": TOOL_TOKENS},
        "tools": tools,
        "toolChoice": {"name": "add"},
    }
    answers = call(INFERENCE, "Chat", body)
    finish = answers[-1]["finish"]
    assert finish["reason"] == "FINISH_REASON_TOOL_CALLS"
    for made in finish["toolCalls"]:
        assert made["name"] == "add"
        jsonschema.validate(json.loads(made["arguments"]), SCHEMAS["add"])
    deltas = [delta for answer in answers for delta in answer.get("toolCalls", ())]
    joined = "".join(delta.get("arguments", "") for delta in deltas if not delta.get("index"))
    assert joined == finish["toolCalls"][0]["arguments"]


def test_tokens_models_and_vectors(call: Caller, router: Server) -> None:
    (found,) = call(INFERENCE, "Tokenize", {"text": "One 日本 🚂"})
    ids = [token["id"] for token in found["tokens"]]
    (text,) = call(INFERENCE, "Detokenize", {"tokenIds": ids})
    assert text == {"text": "One 日本 🚂"}
    (models,) = call(INFERENCE, "ListModels", {})
    assert [model["id"] for model in models["models"]] == [router.model]
    (vectors,) = call(INFERENCE, "Embed", {"inputs": [{"text": "a cat"}]})
    assert len(vectors["embeddings"][0]["values"]) > 10


def test_errors_name_the_field(call: Caller) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(INFERENCE, "Generate", {"text": "x", "parameters": {"temperature": -1}})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in caught.value.details()
