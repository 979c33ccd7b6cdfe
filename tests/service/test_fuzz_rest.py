"""Spoiled bodies on every route: whatever comes is answered, or refused as a client's fault."""

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.fakes import until
from tests.service.routes import BODIES, posts
from tests.service.test_rest_router import House, house_in

SPOILED = 80
"""Bodies of each kind for each route."""

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324),
    *("", " ", "a", "\u0000", "🚂" * 50, "x" * 5000, "NaN", "../../etc", "{{ 7 * 7 }}", "(" * 40),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": [1, {"c": None}]}}, [0] * 300),
    *({"type": "text"}, {"type": "function"}, {"role": "user"}, {"$ref": "#"}, {"type": "object"}),
)
WORDS = ("inputs", "prompt", "messages", "model", "stream", "n", "best_of", "echo", "grammar")
WORDS += ("response_format", "tools", "tool_choice", "logprobs", "suffix", "user", "x" * 300, "é")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    limits = {"max_total_tokens": 64, "max_concurrent_requests": 1000, "payload_limit": 50_000}
    async with house_in(tmp_path, **limits) as house:
        yield house


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a value: what it is in, and its key or index there."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inside:
        found.append((value, key))
        if isinstance(part, dict | list):
            found += spots(part)
    return found


def spoil(body: Any, draw: random.Random) -> Any:
    """A body with one to three places changed, removed, doubled, nested, or added."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        places = spots(body)
        if not places:
            break
        where, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del where[key]
        elif kind == 1:
            where[key] = [where[key]] * draw.randint(1, 3)
        elif kind == 2:
            where[key] = {"x": where[key]}
        elif kind == 3 and isinstance(where, dict):
            where[draw.choice(WORDS)] = copy.deepcopy(draw.choice(ODD))
        else:
            where[key] = copy.deepcopy(draw.choice(ODD))
    return body


def bodies(path: str, draw: random.Random) -> Iterator[bytes]:
    valid = BODIES[path]
    for _ in range(SPOILED):
        yield json.dumps(spoil(valid, draw)).encode()


def garbage(path: str, draw: random.Random) -> Iterator[bytes]:
    """Bytes that may still be JSON, and bytes that are not."""
    valid = json.dumps(BODIES[path]).encode()
    for number in range(SPOILED // 2):
        raw = bytearray(valid)
        for _ in range(draw.randint(1, 8)):
            raw[draw.randrange(len(raw))] = draw.choice(b'{}[]",:0-eE.\\tnu\x00\xff \n9')
        yield bytes(raw[: draw.randrange(len(raw) + 1)] if number % 3 == 0 else raw)
        yield draw.randbytes(draw.randrange(200))


def deep(path: str, draw: random.Random) -> Iterator[bytes]:
    """Nesting of all depths, where it means something and where it does not."""
    for field in sorted(BODIES[path]):
        for depth in (50, 500, 1000, 1023, 1024, 1025, 5000):
            body = json.dumps({**BODIES[path], field: "DEEP"})
            opened, closed = draw.choice((("[", "]"), ('{"a":', "}")))
            yield body.replace('"DEEP"', opened * depth + "1" + closed * depth).encode()


def doubled(path: str, draw: random.Random) -> Iterator[bytes]:
    """The same key again, with something else behind it."""
    valid = json.dumps(BODIES[path])
    for field in sorted(BODIES[path]):
        for value in draw.sample(ODD, 8):
            yield (valid[:-1] + f", {json.dumps(field)}: {json.dumps(value)}}}").encode()


NUMBERS = ("1e999", "-1e999", "1" * 400, "0." + "1" * 400, "1e-999", "-0", "1E+2", "01", "+1", ".5")


def numbers(path: str, _: random.Random) -> Iterator[bytes]:
    """Numbers of all sizes and forms, in place of every number of a good body."""
    valid = BODIES[path]
    for index, (where, key) in enumerate(spots(valid)):
        if isinstance(where[key], int | float) and not isinstance(where[key], bool):
            body = copy.deepcopy(valid)
            changed, same_key = spots(body)[index]
            changed[same_key] = "NUMBER"
            for number in NUMBERS:
                yield json.dumps(body).replace('"NUMBER"', number).encode()


KINDS = (bodies, garbage, deep, doubled, numbers)


def faults_of(path: str, raw: bytes, answer: httpx.Response) -> str:
    """Why an answer will not do, or nothing."""
    shown = f"{path} {raw[:300]!r} -> {answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 500 or not 200 <= answer.status_code < 500:
        return shown
    if answer.status_code >= 400:
        error = answer.json().get("error")
        return "" if error else shown
    # What fails when an answer has begun is an event in the stream, with the status in its object.
    broken = ("incomplete_generation", '"internal', "server_error", '"api_error"')
    return shown if any(word in answer.text for word in broken) else ""


async def send(house: House, path: str, raws: list[bytes]) -> list[str]:
    """Sends them, a few at a time; returns what was wrong with the answers."""
    gate = asyncio.Semaphore(16)
    headers = {"content-type": "application/json"}

    async def one(raw: bytes) -> str:
        async with gate:
            return faults_of(path, raw, await house.client.post(path, content=raw, headers=headers))

    return [fault for fault in await asyncio.gather(*map(one, raws)) if fault]


async def test_the_bodies_that_are_spoiled_are_good(house: House) -> None:
    """Else the tests below would only show that bad bodies are refused."""
    for path, body in posts():
        answer = await house.post(path, body)
        if path == "/v1/embeddings":
            assert answer.status_code == 400, "the scripted engine has no vectors"
        else:
            assert answer.status_code == 200, answer.text
            assert '"error"' not in answer.text.replace('"error":null', "")


@pytest.mark.parametrize("path", BODIES)
async def test_spoiled_bodies_are_refused_or_answered(house: House, path: str) -> None:
    for kind in KINDS:
        raws = list(kind(path, random.Random(f"{path} {kind.__name__}")))
        assert await send(house, path, raws) == [], kind.__name__
    await until(house.idle)


async def test_odd_headers_and_methods(house: House) -> None:
    for path, body in posts():
        raw = json.dumps(body).encode()
        for headers in (
            {"content-type": ""},
            {"content-type": "application/json; charset=utf-7"},
            {"content-type": "\u00e9".encode("latin-1").decode("latin-1")},
            {"accept": "x/y"},
            {"authorization": "Bearer"},
            {"content-encoding": "gzip"},
        ):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = await house.client.post(path, content=raw, headers=encoded)
            assert answer.status_code < 500, (path, headers)
        for method in ("PUT", "DELETE", "PATCH", "HEAD", "TRACE"):
            answer = await house.client.request(method, path)
            assert answer.status_code in (200, 405), (path, method)
    answer = await house.client.get("/v1/models/%ff%00..%2f")
    assert answer.status_code == 404
