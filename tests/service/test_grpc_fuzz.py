"""Damaged and random requests to every method: answers or refusals, never a bug of the router."""

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from router.fmaas.v1 import generation_pb2 as tgis
from router.kserve.v1 import inference_pb2 as kserve
from router.v1 import router_pb2 as pb
from tests.service.kserve_rig import text_bytes
from tests.service.test_grpc_router import house_in

SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
PARAMETERS = pb.Parameters(
    max_tokens=3,
    temperature=0.5,
    top_k=3,
    top_p=0.5,
    min_p=0.1,
    typical_p=0.5,
    repetition_penalty=1.5,
    frequency_penalty=1,
    presence_penalty=1,
    seed=7,
    logit_bias={5: 1.0},
    stop=["a"],
    stop_token_ids=[4],
    logprobs=True,
    top_logprobs=2,
    stream_tokens=2,
    prompt_logprobs=True,
    token_details=True,
    n=2,
    constraint=pb.Constraint(json_schema=SCHEMA),
    ranks=True,
    watermark=True,
)
TEXTS = {"text": "Once upon"}
LISTED = [
    kserve.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1]),
    kserve.ModelInferRequest.InferInputTensor(
        name="sampling_parameters", datatype="BYTES", shape=[1]
    ),
    kserve.ModelInferRequest.InferInputTensor(name="max_tokens", datatype="INT32", shape=[1]),
]
REQUESTS: dict[str, Message] = {
    "router.v1.Inference/Generate": pb.GenerateRequest(
        text="Once upon", parameters=PARAMETERS, priority=1, truncate=3, best_of=2
    ),
    "router.v1.Inference/Chat": pb.ChatRequest(
        messages=[
            pb.ChatMessage(role="user", content="Hi"),
            pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments="{}")]),
            pb.ChatMessage(role="tool", content="1", tool_call_id="a"),
        ],
        parameters=PARAMETERS,
        tools=[pb.Tool(name="f", description="F.", parameters=SCHEMA)],
        tool_choice=pb.ToolChoice(mode=pb.TOOL_MODE_AUTO),
        parallel_tool_calls=False,
        template_variables={"a": [1, {"b": None}]},
        opening=True,
    ),
    "router.v1.Inference/Embed": pb.EmbedRequest(inputs=[pb.EmbedInput(text="a")]),
    "router.v1.Inference/Tokenize": pb.TokenizeRequest(text="Once upon"),
    "router.v1.Inference/TokenizeChat": pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content="Hi")]
    ),
    "router.v1.Inference/Detokenize": pb.DetokenizeRequest(token_ids=[1, 2, 3]),
    "fmaas.GenerationService/Generate": tgis.BatchedGenerationRequest(
        requests=[TEXTS, TEXTS],  # type: ignore[list-item]
        params=tgis.Parameters(
            method=tgis.SAMPLE,
            sampling=tgis.SamplingParameters(temperature=0.5, top_k=3, top_p=0.5, seed=7),
            stopping=tgis.StoppingCriteria(max_new_tokens=3, time_limit_millis=900),
            response=tgis.ResponseOptions(generated_tokens=True, token_ranks=True),
            decoding=tgis.DecodingParameters(json_schema=SCHEMA),
            truncate_input_tokens=3,
        ),
    ),
    "fmaas.GenerationService/Tokenize": tgis.BatchedTokenizeRequest(
        requests=[TEXTS],  # type: ignore[list-item]
        return_tokens=True,
        return_offsets=True,
    ),
    "inference.GRPCInferenceService/ModelInfer": kserve.ModelInferRequest(
        id="1",
        inputs=LISTED,
        raw_input_contents=[
            text_bytes("Once"),
            text_bytes('{"temperature": 0.5, "stop": ["a"], "regex": "a+"}'),
            b"\x03\x00\x00\x00",
        ],
    ),
}
REQUESTS["fmaas.GenerationService/GenerateStream"] = tgis.SingleGenerationRequest(
    request=tgis.GenerationRequest(text="Once"),
    params=REQUESTS["fmaas.GenerationService/Generate"].params,  # type: ignore[attr-defined]
)
BUGS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
STREAMS = ("Generate", "Chat", "GenerateStream")


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one to four of them changed, left out or put in."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found))
        match chance.randrange(3):
            case 0:
                found[at] = chance.randrange(256)
            case 1:
                del found[at]
            case 2:
                found.insert(at, chance.randrange(256))
    return bytes(found)


KINDS: dict[int, tuple[Any, ...]] = {
    Field.CPPTYPE_INT32: (0, 1, -1, 2**31 - 1),
    Field.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 1, 3, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 1, 3, 2**64 - 1),
    Field.CPPTYPE_FLOAT: (0, 0.5, 1, -1, 1e30, math.nan, math.inf),
    Field.CPPTYPE_DOUBLE: (0, 0.5, 1, -1, 1e300, math.nan, math.inf),
    Field.CPPTYPE_BOOL: (True, False),
    Field.CPPTYPE_ENUM: (0, 1, 2, 99),
}
TEXTS_OF_ALL_KINDS = ("", "a", "user", "tîme 🙂", "{", "{}", '{"type": 1}', "(", "\0", "a" * 2000)


def wild(message: Message, chance: random.Random, depth: int = 0) -> Message:
    """The message with fields set to whatever their types allow."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() > 0.25 or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        many = field.is_repeated
        for _ in range(chance.randint(1, 2) if many else 1):
            if field.message_type is not None:
                held = getattr(message, field.name)
                wild(held.add() if many else held, chance, depth + 1)
                continue
            value = chance.choice(KINDS.get(field.cpp_type, TEXTS_OF_ALL_KINDS))
            if field.type == Field.TYPE_BYTES:
                value = value.encode()
            if many:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def copy_of(message: Message) -> Message:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


async def status(channel: grpc.aio.Channel, path: str, data: bytes) -> grpc.StatusCode:
    streams = path.startswith("router.v1") and path.endswith(STREAMS)
    try:
        if streams or path.endswith("GenerateStream"):
            async for _ in channel.unary_stream(f"/{path}")(data, timeout=20):
                pass
        else:
            await channel.unary_unary(f"/{path}")(data, timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("path", REQUESTS)
async def test_damaged_requests_are_answered_or_refused(path: str, tmp_path: Path) -> None:
    data = REQUESTS[path].SerializeToString(deterministic=True)
    chance = random.Random(path)
    async with house_in(tmp_path, adapters=["poet"]) as (_, channel):
        bodies = [data, b"", *(damaged(data, chance) for _ in range(20))]
        bodies += [chance.randbytes(chance.randint(1, 40)) for _ in range(10)]
        for _ in range(40):
            bodies.append(wild(copy_of(REQUESTS[path]), chance).SerializeToString())
            bodies.append(wild(type(REQUESTS[path])(), chance).SerializeToString())
        codes = await asyncio.gather(*(status(channel, path, body) for body in bodies))
    bugs = [body for body, code in zip(bodies, codes, strict=True) if code in BUGS]
    assert not bugs
    assert codes[0] is grpc.StatusCode.OK
    assert len(set(codes)) > 1
