"""Constraints that compile and become too large to follow: a fault of the request, in every way."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from router.api.rest.app import create_app
from router.app import Router
from router.ask import Ask, Params
from router.config import GroupSpec, Settings
from router.errors import Fault, RequestError
from router.generation import Generation
from router.text import constraints
from tests.service.fake_service import FakeMetrics, events_of
from tests.service.fakes import PATIENCE_S, bench_in, until

# Its start is cheap, so it can be compiled.
PATTERN = "(x{0,9}y){40}(a{300}){300}"
LENGTH = 2000
BODY = {
    "messages": [{"role": "user", "content": "Hi"}],
    "guided_regex": PATTERN,
    "temperature": 0,
    "max_tokens": LENGTH,
}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    async with asyncio.timeout(3 * PATIENCE_S), bench_in(tmp_path) as bench:
        groups = [GroupSpec("g", None, (await bench.start("w"),))]
        async with Router(Settings(), groups) as router:
            await until(lambda: all(router.fleet.groups_up().values()))
            yield router


@pytest.fixture
async def client(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(router.service, router.fleet, FakeMetrics(), Settings())  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def whole(generation: Generation) -> None:
    async with generation:
        async for _ in generation:
            pass


async def test_the_clients_own_parameter_is_named(router: Router) -> None:
    asked = constraints.regex(PATTERN, "grammar")
    params = Params(max_tokens=LENGTH, temperature=0, constraint=asked)
    with pytest.raises(RequestError, match="`grammar` became too expensive to follow") as caught:
        await whole(await router.service.generate(Ask("the", params)))
    assert (caught.value.fault, caught.value.field) == (Fault.VALIDATION, "grammar")
    # The driver has counted it when it closed the request.
    assert caught.value.counted


async def test_a_whole_answer_is_a_bad_request(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json=BODY)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == "guided_regex"


async def test_a_stream_ends_with_an_event_that_says_it(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/chat/completions", json={**BODY, "stream": True})
    if answer.status_code == 200:
        *_, last, done = events_of(answer.text)
        assert done == "[DONE]"
    else:
        last = answer.json()
    assert last["error"]["type"] == "invalid_request_error"
    assert last["error"]["param"] == "guided_regex"
