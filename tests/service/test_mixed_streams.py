"""Many answers at once, over all faces, some left by their clients: none is lost or mixed up."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.fakes import PATIENCE_S, until
from tests.service.routes import TOOL
from tests.service.test_rest_router import House, house_in
from tests.service.ways import UNSEEDED, WAYS, Said, Way, Wish, streaming, whole

STREAMS = 64
LEAVERS = 16


async def chat_with_tools(house: House, wish: Wish) -> Said:
    """Tools that the scripted engine does not call: what it says is text."""
    body = {"messages": wish.messages, "tools": [TOOL], "tool_choice": "auto", **wish.openai()}
    message = (await whole(house, "/v1/chat/completions", body))["choices"][0]["message"]
    assert not message.get("tool_calls")
    return Said(message["content"])


async def forced_call(house: House, wish: Wish) -> Said:
    """A call under the constraint of its schema, in pieces and whole."""
    wish = replace(wish, tokens=wish.tokens + 40)
    body = {"messages": wish.messages, "tools": [TOOL], "tool_choice": "required", "stream": True}
    pieces = []
    async with streaming(house, "/v1/chat/completions", body | wish.openai()) as stream:
        async for event in stream:
            for choice in event["choices"]:
                deltas = choice["delta"].get("tool_calls") or ()
                pieces += [delta["function"].get("arguments") or "" for delta in deltas]
    del body["stream"]
    message = (await whole(house, "/v1/chat/completions", body | wish.openai()))["choices"][0]
    calls = message["message"]["tool_calls"]
    assert pieces
    assert "".join(call["function"]["arguments"] for call in calls) == "".join(pieces)
    return Said("".join(pieces), len(pieces))


async def forced_words(house: House, wish: Wish) -> Said:
    """A text under the constraint of a regular expression."""
    body = wish.native()
    body["parameters"]["grammar"] = {"type": "regex", "value": "([a-z]{1,9} )*"}
    text = (await whole(house, "/generate", body))["generated_text"]
    assert re.fullmatch("[a-z ]*", text)
    return Said(text)


async def chat_twice(house: House, wish: Wish) -> Said:
    """Both answers, one behind the other."""
    texts = {0: "", 1: ""}
    body = {"messages": wish.messages, "n": 2, "stream": True, **wish.openai()}
    async with streaming(house, "/v1/chat/completions", body) as stream:
        async for event in stream:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    return Said("|".join(texts.values()))


async def leave_rest(house: House, wish: Wish) -> None:
    """Leaves when something has come."""
    path, body = "/generate_stream", wish.native()
    if wish.seed is None:
        path, body = "/v1/chat/completions", {"messages": wish.messages, **wish.openai()}
        body |= {"stream": True, "n": 2}
    async with streaming(house, path, body) as stream:
        async for _ in stream:
            return


async def leave_grpc(house: House, wish: Wish) -> None:
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        request = pb.GenerateRequest(text=wish.prompt, parameters=wish.parameters())
        call = InferenceStub(channel).Generate(request, timeout=PATIENCE_S)
        assert await call.read()
        call.cancel()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, {"step_ms": "1"}, max_concurrent_requests=1000) as house:
        yield house


def cases(draw: random.Random) -> list[tuple[Way, Wish]]:
    """Each way at least twice, with prompts that share beginnings and others that share nothing."""
    ways = [*WAYS, chat_with_tools, forced_call, forced_words, chat_twice]
    ways *= STREAMS // len(ways) + 1
    found = []
    for number, way in enumerate(ways[:STREAMS]):
        seed = None if way in UNSEEDED or draw.random() < 0.5 else draw.randrange(1000)
        start = draw.choice(("Once upon a time 🚂 ", "שלום ", ""))
        found.append((way, Wish(f"{start}number {number}", draw.randint(5, 60), seed)))
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("seed", [1, 2])
async def test_64_mixed_streams_lose_and_mix_nothing(house: House, seed: int) -> None:
    draw = random.Random(seed)
    asked = cases(draw)
    leavers = [
        (leave_grpc if number % 2 else leave_rest)(
            house, Wish(f"Once upon a time 🚂 nobody {number}", 500, None if number % 3 else number)
        )
        for number in range(LEAVERS)
    ]
    *said, _ = await asyncio.gather(
        *(way(house, wish) for way, wish in asked), asyncio.gather(*leavers)
    )
    await until(house.idle)
    for (way, wish), answer in zip(asked, said, strict=True):
        alone = await way(house, wish)
        assert answer.text == alone.text, way.__name__
        assert (answer.prompt, answer.completion) == (alone.prompt, alone.completion)
    await until(house.idle)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_every_way_says_the_same(house: House, way: Way) -> None:
    """So that "alone" above means the same to all of them."""
    for seed in (None, 5):
        if seed is not None and way in UNSEEDED:
            continue
        wish = Wish("Once upon a time", 40, seed)
        expected = await house.post("/generate", wish.native())
        said = await way(house, wish)
        assert said.text == expected.json()["generated_text"]
        assert said.completion in (None, 40)
