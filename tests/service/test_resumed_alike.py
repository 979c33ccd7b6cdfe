"""An answer whose worker is lost is the one that it would have been, whatever was asked for."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.service.fake_service import events_of
from tests.service.fakes import until
from tests.service.routes import TOOL
from tests.service.test_rest_router import Body, House, house_in

USER = [{"role": "user", "content": "the way"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"type": "string", "minLength": 60, "maxLength": 80}
SCHEMA = {"type": "object", "properties": {"a": LONG}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
WORKER = {"step_ms": "3"}
OF_ONE_ANSWER = ("created", "usage")
"""What may differ: of a prompt some may have been computed already, the second time."""

ASKED: list[tuple[str, Body]] = [
    (COMPLETIONS, {"prompt": "the", "echo": True, "logprobs": 2, "n": 2, "frequency_penalty": 1}),
    (COMPLETIONS, {"prompt": "of it", "best_of": 3, "n": 2, "repetition_penalty": 1.3}),
    (COMPLETIONS, {"prompt": "of it is", "temperature": 0, "prompt_logprobs": 2, "logprobs": 1}),
    (CHAT, {"messages": USER, "response_format": FORMAT, "n": 2, "logprobs": True}),
    (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"messages": USER, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 1}),
    ("/generate", {"inputs": "the", "parameters": {"seed": 5, "temperature": 0.7, "details": True,
     "top_n_tokens": 2, "decoder_input_details": True, "watermark": True, "typical_p": 0.9}}),
    ("/generate_stream", {"inputs": "the", "parameters": {"seed": 5, "do_sample": True,
     "repetition_penalty": 1.2, "details": True}}),
]  # fmt: skip


def bounded(path: str, body: Body) -> Body:
    if path.startswith("/v1/"):
        return {"max_tokens": 50, "seed": 3, **body}
    return {**body, "parameters": {"max_new_tokens": 50, **body["parameters"]}}


def kept(value: Any) -> Any:
    """What has to be the same: no names of answers and calls, which are texts, and no counts."""
    if isinstance(value, dict):
        return {
            name: kept(one)
            for name, one in value.items()
            if name not in OF_ONE_ANSWER and not (name == "id" and isinstance(one, str))
        }
    return [kept(one) for one in value] if isinstance(value, list) else value


def pieces(text: str) -> Any:
    """A whole answer; or a stream, by choice, however it was cut into events."""
    if not text.startswith("data:"):
        return kept(json.loads(text))
    texts, tokens = dict[int, str](), dict[int, list[Any]]()
    for event in events_of(text):
        if event == "[DONE]":
            continue
        for choice in event.get("choices", ()):
            index = choice["index"]
            texts[index] = texts.get(index, "") + (choice["delta"].get("content") or "")
            tokens.setdefault(index, []).extend(choice["logprobs"]["content"])
        if "token" in event:
            tokens.setdefault(0, []).append(event)
    return texts, tokens


async def steps(house: House, count: int, answer: asyncio.Task[Any]) -> None:
    """Waits until the worker has begun so many steps, or there is nothing left to compute."""
    engines = house.bench.engines
    await until(lambda: ("w" in engines and engines["w"].begun >= count) or answer.done())


@pytest.mark.parametrize(("path", "body"), ASKED)
async def test_what_is_asked_for_is_the_same(tmp_path: Path, path: str, body: Body) -> None:
    async with house_in(tmp_path, dict(WORKER)) as house:
        asked = bounded(path, body)
        whole = await house.post(path, asked)
        assert whole.status_code == 200, whole.text
        begun = house.bench.engines["w"].begun
        answer = asyncio.create_task(house.post(path, asked))
        await steps(house, begun + 10, answer)
        for _ in range(2):
            assert not answer.done()
            await house.bench.kill("w")
            del house.bench.engines["w"]
            await house.bench.start("w", **WORKER)
            await steps(house, 6, answer)
        resumed = await answer
        assert resumed.status_code == 200, resumed.text
        assert pieces(resumed.text) == pieces(whole.text)
        assert house.router.driver._core.snapshot().resumed >= 2
