"""An error known before the first byte has its HTTP status on every route; after it, an event."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.api.rest.errors import Dialect, status_of
from router.errors import WIRE, Fault, RequestError
from tests.service.fakes import until
from tests.service.test_rest_keys import GUARDED
from tests.service.test_rest_router import House, house_in

Body = dict[str, Any]
TGI, OPENAI, ANTHROPIC = Dialect.TGI, Dialect.OPENAI, Dialect.ANTHROPIC
USER = [{"role": "user", "content": "hello"}]
# All greedy, native ones by themselves: an answer that is drawn may end early by chance.
GREEDY = {"temperature": 0}
NATIVE, CHAT, COMPLETION = {"inputs": "x"}, {"messages": USER} | GREEDY, {"prompt": "x"} | GREEDY
RESPONSE, MESSAGE = {"input": "x"} | GREEDY, {"messages": USER, "model": "tgi"} | GREEDY
STREAM = {"stream": True}
# Route, body, whose words its answers have, whether they are streamed.
ROUTES: list[tuple[str, Body, Dialect, bool]] = [
    ("/generate", NATIVE, TGI, False),
    ("/generate_stream", NATIVE, TGI, True),
    ("/", NATIVE, TGI, False),
    ("/", NATIVE | STREAM, TGI, True),
    ("/invocations", NATIVE, TGI, False),
    ("/invocations", NATIVE | STREAM, TGI, True),
    ("/invocations", CHAT, OPENAI, False),
    ("/invocations", CHAT | STREAM, OPENAI, True),
    ("/invocations", COMPLETION | STREAM, OPENAI, True),
    ("/vertex", {"instances": [NATIVE]}, TGI, False),
    ("/vertex", {"instances": [CHAT]}, TGI, False),
    ("/v1/chat/completions", CHAT, OPENAI, False),
    ("/v1/chat/completions", CHAT | STREAM, OPENAI, True),
    ("/v1/completions", COMPLETION, OPENAI, False),
    ("/v1/completions", COMPLETION | STREAM, OPENAI, True),
    ("/v1/responses", RESPONSE, OPENAI, False),
    ("/v1/responses", RESPONSE | STREAM, OPENAI, True),
    ("/v1/messages", MESSAGE, ANTHROPIC, False),
    ("/v1/messages", MESSAGE | STREAM, ANTHROPIC, True),
]
# These do not generate.
OTHERS = {"/tokenize", "/chat_tokenize", "/v1/embeddings", "/v1/messages/count_tokens"}


def test_no_route_is_forgotten() -> None:
    assert {route[0] for route in ROUTES} | OTHERS == {one.split()[1] for one in GUARDED}


def limited(path: str, body: Body, tokens: int) -> Body:
    """The body with a limit of tokens, wherever that kind of body has it."""
    if "instances" in body:
        return {"instances": [limited(path, one, tokens) for one in body["instances"]]}
    if "inputs" in body:
        return body | {"parameters": {"max_new_tokens": tokens}}
    return body | {"max_output_tokens" if path == "/v1/responses" else "max_tokens": tokens}


def named(body: Body, model: str) -> Body:
    if "instances" in body:
        return {"instances": [named(one, model) for one in body["instances"]]}
    return body | {"model": model}


def check(answer: httpx.Response, fault: Fault, dialect: Dialect) -> None:
    """An error response has the status and the shape of its dialect."""
    wire = WIRE[fault]
    assert answer.status_code == status_of(RequestError(fault, ""), dialect), answer.text
    assert answer.headers["content-type"] == "application/json"
    assert ("retry-after" in answer.headers) == (wire.retry_after_s is not None)
    body = answer.json()
    match dialect:
        case Dialect.TGI:
            assert set(body) == {"error", "error_type"}
            assert body["error_type"] == wire.tgi
        case Dialect.OPENAI:
            assert set(body["error"]) == {"message", "type", "param", "code"}
            assert body["error"]["type"] == wire.openai
        case Dialect.ANTHROPIC:
            assert body["type"] == "error"
            assert set(body["error"]) == {"type", "message"}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, max_concurrent_requests=1, attempts_max=1) as house:
        yield house


async def test_before_the_first_byte(house: House) -> None:
    for path, body, dialect, _ in ROUTES:
        check(await house.post(path, limited(path, body, 0)), Fault.VALIDATION, dialect)
        if path != "/v1/messages":  # Anthropic's limit is only the most that the client wants
            check(await house.post(path, limited(path, body, 10**7)), Fault.VALIDATION, dialect)
        unknown = named(limited(path, body, 2), "other")
        check(await house.post(path, unknown), Fault.MODEL_NOT_FOUND, dialect)
        for default in ("tgi", "dummy", "https://endpoint.example/v1", "m"):
            answer = await house.post(path, limited(path, named(body, default), 2))
            assert answer.status_code == 200, (path, answer.text)
            await until(house.idle)


@pytest.mark.parametrize(("path", "body", "dialect"), [route[:3] for route in ROUTES])
async def test_too_many_and_a_worker_that_is_lost_before_it_has_said_anything(
    house: House, path: str, body: Body, dialect: Dialect
) -> None:
    house.bench.gates["w"].clear()
    first = asyncio.create_task(house.post(path, limited(path, body, 4)))
    await until(lambda: house.router.driver.open_requests == 1)
    check(await house.post(path, limited(path, body, 4)), Fault.OVERLOADED, dialect)
    await until(lambda: house.bench.engines["w"].begun)
    await house.bench.kill("w")
    check(await first, Fault.WORKER_LOST, dialect)


@pytest.mark.parametrize(("path", "body", "dialect", "stream"), ROUTES)
async def test_after_the_first_byte(
    tmp_path: Path, path: str, body: Body, dialect: Dialect, stream: bool
) -> None:
    async with house_in(tmp_path, {"fail_sequence_after": "3"}) as house:
        answer = await house.post(path, limited(path, body, 8))
        if not stream:
            check(answer, Fault.ENGINE_FAILED, dialect)
            return
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.text.splitlines() if line.startswith("data:")]
        events = [line.removeprefix("data:").strip() for line in lines]
        if events[-1] == "[DONE]":
            events.pop()
        *others, last = (json.loads(event) for event in events)
        assert others
        assert not any(has_failed(event) for event in others)
        assert has_failed(last)
        await until(house.idle)


def has_failed(event: Body) -> bool:
    """Whether an event of any dialect says that the answer broke off."""
    response = event.get("response") or {}
    return bool(event.get("error") or response.get("error") or event.get("type") == "error")
