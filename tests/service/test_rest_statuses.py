"""An error known before the first byte has its HTTP status on every route; after it, an event."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.api.rest.errors import OPENAI_STATUS
from router.errors import WIRE, Fault
from tests.service.fakes import until
from tests.service.test_rest_router import House, house_in

Body = dict[str, Any]
USER = [{"role": "user", "content": "hello"}]
NATIVE, CHAT, COMPLETION = {"inputs": "x"}, {"messages": USER}, {"prompt": "x"}
# Route, body, whether its answers are OpenAI's, whether they are streamed.
ROUTES: list[tuple[str, Body, bool, bool]] = [
    ("/generate", NATIVE, False, False),
    ("/generate_stream", NATIVE, False, True),
    ("/", NATIVE, False, False),
    ("/", NATIVE | {"stream": True}, False, True),
    ("/invocations", NATIVE, False, False),
    ("/invocations", NATIVE | {"stream": True}, False, True),
    ("/invocations", CHAT, True, False),
    ("/invocations", CHAT | {"stream": True}, True, True),
    ("/invocations", COMPLETION | {"stream": True}, True, True),
    ("/vertex", {"instances": [NATIVE]}, False, False),
    ("/vertex", {"instances": [CHAT]}, False, False),
    ("/v1/chat/completions", CHAT, True, False),
    ("/v1/chat/completions", CHAT | {"stream": True}, True, True),
    ("/v1/completions", COMPLETION, True, False),
    ("/v1/completions", COMPLETION | {"stream": True}, True, True),
]
EACH = pytest.mark.parametrize(("path", "body", "openai", "stream"), ROUTES)
EACH_BEFORE = pytest.mark.parametrize(("path", "body", "openai"), [route[:3] for route in ROUTES])


def limited(body: Body, tokens: int) -> Body:
    """The body with a limit of tokens, wherever that kind of body has it."""
    if "instances" in body:
        return {"instances": [limited(one, tokens) for one in body["instances"]]}
    if "inputs" in body:
        return body | {"parameters": {"max_new_tokens": tokens}}
    return body | {"max_tokens": tokens}


def named(body: Body, model: str) -> Body:
    if "instances" in body:
        return {"instances": [named(one, model) for one in body["instances"]]}
    return body | {"model": model}


def check(answer: httpx.Response, fault: Fault, openai: bool) -> None:
    """An error response has the status and the shape of its dialect."""
    wire = WIRE[fault]
    assert answer.status_code == (OPENAI_STATUS.get(fault, wire.http) if openai else wire.http)
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"] if openai else answer.json()["error_type"]) in (wire.openai, wire.tgi)
    assert ("retry-after" in answer.headers) == (wire.retry_after_s is not None)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, max_concurrent_requests=1, attempts_max=1) as house:
        yield house


async def test_before_the_first_byte(house: House) -> None:
    for path, body, openai, _ in ROUTES:
        check(await house.post(path, limited(body, 0)), Fault.VALIDATION, openai)
        check(await house.post(path, limited(body, 10**7)), Fault.VALIDATION, openai)
        check(await house.post(path, named(body, "other")), Fault.MODEL_NOT_FOUND, openai)
        for default in ("tgi", "dummy", "https://endpoint.example/v1", "m"):
            answer = await house.post(path, limited(named(body, default), 2))
            assert answer.status_code == 200, answer.text
            await until(house.idle)


@EACH_BEFORE
async def test_too_many_and_a_worker_that_is_lost_before_it_has_said_anything(
    house: House, path: str, body: Body, openai: bool
) -> None:
    house.bench.gates["w"].clear()
    first = asyncio.create_task(house.post(path, limited(body, 4)))
    await until(lambda: house.router.driver.open_requests == 1)
    check(await house.post(path, limited(body, 4)), Fault.OVERLOADED, openai)
    await until(lambda: house.bench.engines["w"].begun)
    await house.bench.kill("w")
    check(await first, Fault.WORKER_LOST, openai)


@EACH
async def test_after_the_first_byte(
    tmp_path: Path, path: str, body: Body, openai: bool, stream: bool
) -> None:
    async with house_in(tmp_path, {"fail_sequence_after": "3"}) as house:
        answer = await house.post(path, limited(body, 8))
        if not stream:
            check(answer, Fault.ENGINE_FAILED, openai)
            return
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [block.partition(":")[2].strip() for block in answer.text.split("\n\n") if block]
        if openai:
            assert events.pop() == "[DONE]"
            error = json.loads(events[-1])["error"]
            assert error["type"] == WIRE[Fault.ENGINE_FAILED].openai
        else:
            error = json.loads(events[-1])
            assert error["error_type"] == "generation"
        assert len(events) >= 2
        assert all("error" not in json.loads(event) for event in events[:-1])
        await until(house.idle)
