"""The openai package's clients, which refuse answers that are not of their own types."""

from collections.abc import AsyncIterator, Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.heavy.clients.world import KEY, PATIENCE_S
from tests.system.server import Server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{server.rest}/v1",
        api_key=KEY,
        timeout=PATIENCE_S,
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture
async def patient(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{server.rest}/v1",
        api_key=KEY,
        timeout=PATIENCE_S,
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client
