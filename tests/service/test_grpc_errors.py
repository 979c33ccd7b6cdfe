"""What becomes of errors on their way to clients of gRPC."""

import asyncio

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from router.errors import Fault, RequestError
from router.v1 import router_pb2 as pb
from tests.service.fake_service import FakeService
from tests.service.grpc_rig import channel_of, details_of, failure, stub_of

# What clients of gRPC take of trailers without a setting of their own: 8 KB, and at most 16.
TRAILERS_MAX = 8192


@pytest.mark.parametrize("letter", ["x", "%", "é", "漢", "🙂", "\n", "\x7f"])
async def test_a_long_text_arrives_whatever_its_letters_are(letter: str) -> None:
    service = FakeService([RequestError(Fault.VALIDATION, letter * 5000, "prompt")])
    async with stub_of(service) as stub, asyncio.timeout(10):
        error = await failure(stub.Generate(pb.GenerateRequest(text="x")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    text = error.details() or ""
    assert len(text.encode()) > 1000
    assert text == letter * len(text)
    (violation,) = details_of(error)["BadRequest"].field_violations
    assert violation.description == text
    sent = sum(len(key) + len(value) for key, value in error.trailing_metadata() or ())
    escaped = sum(1 if 32 <= byte <= 126 and byte != 37 else 3 for byte in text.encode())
    assert 4 * sent // 3 + escaped <= TRAILERS_MAX


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_bytes_that_ask_for_no_health_are_an_invalid_argument(method: str) -> None:
    async with channel_of(FakeService()) as channel, asyncio.timeout(10):
        make = channel.unary_unary if method == "Check" else channel.unary_stream
        call = make(
            f"/grpc.health.v1.Health/{method}",
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(b"\xff\xff")
        error = await failure(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
