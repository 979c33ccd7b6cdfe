"""A client of TGIS's generation service that knows its numbers only."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from tests.service import foreign
from tests.service.fake_service import FakeService
from tests.service.grpc_rig import channel_of

PB = foreign.messages("fmaas", foreign.TGIS)
PATH = "/fmaas.GenerationService"


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.generate = foreign.unary(channel, f"{PATH}/Generate", PB["BatchedGenerationResponse"])
        self.generate_stream = foreign.stream(
            channel, f"{PATH}/GenerateStream", PB["GenerationResponse"]
        )
        self.tokenize = foreign.unary(channel, f"{PATH}/Tokenize", PB["BatchedTokenizeResponse"])
        self.model_info = foreign.unary(channel, f"{PATH}/ModelInfo", PB["ModelInfoResponse"])


@asynccontextmanager
async def client_of(service: FakeService, **given: Any) -> AsyncIterator[Client]:
    async with channel_of(service, **given) as channel:
        yield Client(channel)


def batch(*texts: str, **fields: Any) -> Any:
    return PB["BatchedGenerationRequest"](requests=[{"text": text} for text in texts], **fields)


def single(text: str, **fields: Any) -> Any:
    return PB["SingleGenerationRequest"](request={"text": text}, **fields)
