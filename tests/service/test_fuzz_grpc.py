"""Spoiled messages on every gRPC method: the status names a fault of the client, or it is none."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from router.fmaas.v1 import generation_pb2
from router.kserve.v1 import inference_pb2
from router.v1 import router_pb2
from tests.service.fakes import until
from tests.service.test_rest_router import House, house_in

MESSAGES = 60
"""Messages for each method."""

LIMIT_S = 3.0
"""A client's own deadline: an answer that long is one, too."""

TEXTS = (
    "",
    "x",
    "m",
    "no-such",
    "🚂" * 20,
    "\u0000",
    "{",
    '{"type": "object"}',
    "(" * 30,
    "[a-z]+",
)
TEXTS += ("user", "tool", "text_input", "BYTES", "INT32", "sampling_parameters", "x" * 3000)
WHOLES = (0, 1, 2, 5, 255, 2**16, 2**31 - 1)
REALS = (0.0, 0.5, 1.0, -1.0, 3.0, 1e30, float("nan"), float("inf"), -float("inf"))
# What is the server's fault, and so never the answer to a message. A stop of the fuzzer's own
# deadline is none.
OURS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.ABORTED,
}
GREEDY = {"max_tokens": 3, "temperature": 0}
SHORT = generation_pb2.Parameters(stopping={"max_new_tokens": 3})
TENSORS = inference_pb2.ModelInferRequest(
    model_name="m",
    inputs=[
        {
            "name": "text_input",
            "datatype": "BYTES",
            "shape": [1],
            "contents": {"bytes_contents": [b"Once"]},
        }
    ],
    parameters={"max_tokens": inference_pb2.InferParameter(int64_param=3)},
)
GOOD: dict[str, Message] = {
    "Inference.Generate": router_pb2.GenerateRequest(text="Once", parameters=GREEDY),
    "Inference.Chat": router_pb2.ChatRequest(
        messages=[{"role": "user", "content": "Once"}], parameters=GREEDY
    ),
    "Inference.TokenizeChat": router_pb2.ChatRequest(messages=[{"role": "user", "content": "x"}]),
    "GenerationService.Generate": generation_pb2.BatchedGenerationRequest(
        requests=[{"text": "Once"}], params=SHORT
    ),
    "GenerationService.GenerateStream": generation_pb2.SingleGenerationRequest(
        request={"text": "Once"}, params=SHORT
    ),
    "GRPCInferenceService.ModelInfer": TENSORS,
    "GRPCInferenceService.ModelStreamInfer": TENSORS,
}
"""Of the methods that run a model: what is answered, so that spoiling it goes deeper than noise."""

METHODS: list[MethodDescriptor] = [
    method
    for file in (router_pb2, generation_pb2, inference_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    limits = {"max_total_tokens": 64, "max_concurrent_requests": 1000, "payload_limit": 50_000}
    async with house_in(tmp_path, **limits) as house:
        yield house


def value_of(field: FieldDescriptor, draw: random.Random, depth: int) -> Any:
    """A value of the field's type, likely or not."""
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_MESSAGE:
            return message_of(field.message_type, draw, depth - 1)
        case kinds.CPPTYPE_STRING:
            text = draw.choice(TEXTS)
            return text.encode() if field.type == kinds.TYPE_BYTES else text
        case kinds.CPPTYPE_BOOL:
            return draw.random() < 0.5
        case kinds.CPPTYPE_ENUM:
            return draw.choice((*(value.number for value in field.enum_type.values), 99))
        case kinds.CPPTYPE_FLOAT | kinds.CPPTYPE_DOUBLE:
            return draw.choice(REALS)
    signed = field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64)
    return draw.choice((*WHOLES, -1) if signed else WHOLES)


def message_of(kind: Descriptor, draw: random.Random, depth: int = 5) -> Message:
    """A message with some of its fields set: few, or more than half."""
    message = GetMessageClass(kind)()
    share = draw.choice((0.1, 0.3, 0.6))
    for field in kind.fields:
        if depth <= 0 or draw.random() > share:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            fill_map(getattr(message, field.name), field, draw, depth)
        elif field.is_repeated:
            values = [value_of(field, draw, depth) for _ in range(draw.randint(0, 3))]
            getattr(message, field.name).extend(values)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(value_of(field, draw, depth))
        else:
            setattr(message, field.name, value_of(field, draw, depth))
    return message


def fill_map(entries: Any, field: FieldDescriptor, draw: random.Random, depth: int) -> None:
    by_name = field.message_type.fields_by_name
    for _ in range(draw.randint(0, 2)):
        key = value_of(by_name["key"], draw, depth)
        value = value_of(by_name["value"], draw, depth)
        if isinstance(value, Message):
            entries[key].CopyFrom(value)
        else:
            entries[key] = value


def spoiled(method: MethodDescriptor, draw: random.Random) -> Iterator[bytes]:
    """Messages of the method, the same with bytes changed, and bytes that are nothing."""
    name = f"{method.containing_service.name}.{method.name}"
    for number in range(MESSAGES):
        message = message_of(method.input_type, draw, draw.randint(1, 5))
        if name in GOOD and number % 5:
            # What is set wins, lists grow: a good message with a few fields of another.
            spoils, message = message, GetMessageClass(method.input_type)()
            message.CopyFrom(GOOD[name])
            message.MergeFrom(spoils)
        raw = message.SerializeToString()
        if number % 4 == 1 and raw:
            changed = bytearray(raw)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            raw = bytes(changed)
        elif number % 8 == 3:
            raw = draw.randbytes(draw.randrange(60))
        yield raw


async def status_of(
    channel: grpc.aio.Channel, method: MethodDescriptor, raw: bytes
) -> tuple[grpc.StatusCode, str]:
    """Calls the method with these bytes and reads all answers."""

    async def once() -> AsyncIterator[bytes]:
        yield raw

    path = f"/{method.containing_service.full_name}/{method.name}"
    both = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }
    make: Any = both[method.client_streaming, method.server_streaming]
    call = make(path)(once() if method.client_streaming else raw, timeout=LIMIT_S)
    try:
        if method.server_streaming:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def test_the_messages_that_are_spoiled_are_good(house: House) -> None:
    by_name = {f"{method.containing_service.name}.{method.name}": method for method in METHODS}
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        for name, message in GOOD.items():
            found = await status_of(channel, by_name[name], message.SerializeToString())
            assert found[0] is grpc.StatusCode.OK, (name, found)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
async def test_spoiled_messages_are_refused_or_answered(
    house: House, method: MethodDescriptor
) -> None:
    draw = random.Random(method.full_name)
    raws = list(spoiled(method, draw))
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        gate = asyncio.Semaphore(8)

        async def one(raw: bytes) -> tuple[grpc.StatusCode, str]:
            async with gate:
                return await status_of(channel, method, raw)

        found = await asyncio.gather(*map(one, raws))
    bad = [(raw, status) for raw, status in zip(raws, found, strict=True) if status[0] in OURS]
    assert bad == []
    assert all(details for code, details in found if code is not grpc.StatusCode.OK)
    await until(house.idle)
