"""A gRPC server around a fake service, and what its clients see."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from router.api import grpc_server
from router.config import Settings
from router.conversation import ChatAsk, ChatChunk
from router.faces import _free_port
from router.v1 import router_pb2_grpc
from tests.service.fake_service import FakeFleet, FakeGeneration, FakeService

Stub = router_pb2_grpc.InferenceStub


class FakeChats:
    """Answers every chat with one script."""

    def __init__(self, *steps: ChatChunk | Exception) -> None:
        self.steps = steps
        self.asks: list[ChatAsk] = []
        self.refusal: Exception | None = None
        self.service = FakeService()

    async def chat(self, ask: ChatAsk) -> FakeGeneration:
        if self.refusal is not None:
            raise self.refusal
        self.asks.append(ask)
        return FakeGeneration(self.service, self.steps)  # type: ignore[arg-type]


@asynccontextmanager
async def address_of(
    service: FakeService, chats: FakeChats | None = None, **given: Any
) -> AsyncIterator[str]:
    service.fleet = service.fleet or FakeFleet()
    settings = Settings(host="127.0.0.1", grpc_port=_free_port("127.0.0.1"), **given)
    server = await grpc_server.start(service, service.fleet, settings, chats)  # type: ignore[arg-type]
    try:
        yield f"127.0.0.1:{settings.grpc_port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def channel_of(
    service: FakeService, chats: FakeChats | None = None, **given: Any
) -> AsyncIterator[grpc.aio.Channel]:
    async with (
        address_of(service, chats, **given) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        yield channel


@asynccontextmanager
async def stub_of(
    service: FakeService, chats: FakeChats | None = None, **given: Any
) -> AsyncIterator[Stub]:
    async with channel_of(service, chats, **given) as channel:
        yield Stub(channel)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""

    async def finish() -> None:
        if hasattr(call, "__aiter__"):
            [message async for message in call]
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return caught.value


def details_of(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The details of an error's rich status, by the names of their messages."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    found: dict[str, Any] = {}
    for packed in status.details:
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
        ):
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    return found


def field_of(error: grpc.aio.AioRpcError) -> str:
    """The field that an error names."""
    (violation,) = details_of(error)["BadRequest"].field_violations
    return str(violation.field)


async def read(call: Any) -> Sequence[Any]:
    """All messages of a stream."""
    return [message async for message in call]
