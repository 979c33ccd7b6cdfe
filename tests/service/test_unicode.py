"""Texts of all scripts go in and come out unchanged, whichever way they take."""

import json
from collections.abc import AsyncIterator
from itertools import product
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.fmaas.v1 import generation_pb2 as fmaas
from tests.service.fakes import PATIENCE_S, until
from tests.service.routes import posts
from tests.service.test_rest_router import House, house_in
from tests.service.ways import UNSEEDED, WAYS, Way, Wish

TEXTS = {
    "emoji": "🙂🚂🦕 \U0001fae0",
    "joined": "👩‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀 🇫🇷🇺🇦",
    "combining": "e\u0301 n\u0303 a\u0300\u0316\u0334 Z̸͕̈a̷͖̽l̶̙̎g̷̫̃o̸̠͐",
    "right to left": "שלום עולם، مرحبا بالعالم \u202bab\u202c \u200f",
    "scripts": "日本語 한국어 नमस्ते ไทย Ελληνικά ქართული ᚠᚢᚦ 𝔘𝔫𝔦",
    "edges": "\u0000\u0001\u007f\u0085\u2028\u2029\ufeff\ufffd\uffff\U0010ffff",
    "spaces": " \u00a0\u200b\u3000\t\r\n\n  x \u180e",
    "json": '"\\ \\u0041 {"a": [1]} </script> %s {{x}} data: x\n\ndata: [DONE]\n\n',
}
BROKEN = (b"\xff", b"\xed\xa0\xbd", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe6")
LONE = (r"\ud83d", r"\ude82", r"a\ud83d\ud83db", r"\udc80")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path) as house:
        yield house


def title(way: Way) -> str:
    return way.__name__


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_an_answer_comes_out_whole_every_way(tmp_path: Path, text: str) -> None:
    """The engine says this text, a token or a few bytes at a time."""
    async with house_in(tmp_path, {"answer": text}) as house:
        for way in WAYS:
            said = await way(house, Wish("x", 400))
            assert said.text == text, way.__name__
        await until(house.idle)


@pytest.mark.parametrize("way", WAYS, ids=title)
async def test_a_prompt_goes_in_whole(house: House, way: Way) -> None:
    """What the engine says depends on every token of the prompt."""
    for text in TEXTS.values():
        wish = Wish(text, 12, None if way in UNSEEDED else 7)
        found = await house.post("/tokenize", {"inputs": wish.prompt})
        expected = await house.post("/generate", wish.native())
        said = await way(house, wish)
        assert said.text == expected.json()["generated_text"]
        assert said.prompt in (None, len(found.json()))


async def test_prompts_come_back_whole(house: House) -> None:
    for text in TEXTS.values():
        body: dict[str, Any] = {"inputs": text, "parameters": {"max_new_tokens": 1}}
        body["parameters"]["return_full_text"] = True
        (answer,) = (await house.post("/", body)).json()
        assert answer["generated_text"].startswith(text)
        body = {"prompt": text, "echo": True, "max_tokens": 1, "logprobs": 0}
        choice = (await house.post("/v1/completions", body)).json()["choices"][0]
        assert choice["text"].startswith(text)
        chat = {"messages": [{"role": "user", "content": text}]}
        laid_out = (await house.post("/chat_tokenize", chat)).json()
        assert laid_out["templated_text"] == Wish(text, 1).prompt


async def test_escapes_of_pairs_are_characters(house: House) -> None:
    plain = await house.post("/generate", Wish("🚂", 8).native())
    escaped = json.dumps(Wish("🚂", 8).native())
    assert r"\ud83d\ude82" in escaped
    headers = {"content-type": "application/json"}
    answer = await house.client.post("/generate", content=escaped, headers=headers)
    assert answer.json() == plain.json()


async def test_half_of_a_pair_is_no_text(house: House) -> None:
    """On every route: 400, in the words of the route's own protocol."""
    headers = {"content-type": "application/json"}
    for (path, body), lone in product(posts(), LONE):
        raw = json.dumps(body).replace("TEXT", lone)
        assert lone in raw, path
        answer = await house.client.post(path, content=raw, headers=headers)
        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]


async def test_bytes_that_are_no_text_are_refused(house: House) -> None:
    for (path, body), raw in product(posts(), BROKEN):
        content = json.dumps(body).encode().replace(b"TEXT", raw)
        answer = await house.client.post(path, content=content)
        assert answer.status_code == 400, (path, answer.text)
    # Field 1 of each message holds a text.
    bad = b"\x0a\x01\xff"
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        for method in (
            "/router.v1.Inference/Generate",
            "/router.v1.Inference/Chat",
            "/fmaas.GenerationService/GenerateStream",
        ):
            call = channel.unary_stream(method)(bad, timeout=PATIENCE_S)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
        request = fmaas.BatchedTokenizeRequest(requests=[{"text": "x"}]).SerializeToString()
        assert await channel.unary_unary("/fmaas.GenerationService/Tokenize")(request)
