"""Constraints on the embedded model, router and worker in this process: every answer validates.

The model has 135 million parameters and seldom does as it is told, so what is right about an answer
is the constraint's doing.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deploy.models import embedded
from router.app import Router
from router.ask import Ask, Constraint, Finish, Params
from router.config import GroupSpec, Settings
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.text import constraints
from shards.engines import load
from shards.engines.base import EngineOptions
from shards.worker import Worker

PATIENCE_S = 400.0
QUESTION = "<|im_start|>user\nTell me about {}. Answer in JSON.<|im_end|>\n<|im_start|>assistant\n"
TOKENS_MAX = 160


def record(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "maxLength": 30}
SCHEMAS: dict[str, Any] = {
    "flat": record(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 130}),
    "nested": record(city=record(name=TEXT, mayor=record(name=TEXT, since={"type": "integer"}))),
    "array of bounded length": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 9},
        "minItems": 3,
        "maxItems": 5,
    },
    "array of objects": {"type": "array", "items": record(x=TEXT), "minItems": 1, "maxItems": 2},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {
        "type": "array",
        "prefixItems": [TEXT, {"type": "boolean"}, {"type": "null"}],
        "items": False,
        "minItems": 3,
    },
    "enum": {"enum": ["red", "green", "blue"]},
    "enum of all types": record(v={"enum": [1, 2.5, None, True, "x", ["a"], {"b": 1}]}),
    "const": {"const": {"kind": "train", "wheels": [4, 4], "name": "Zug"}},
    "number": record(n={"type": "number", "minimum": -1.5, "maximum": 2.25}),
    "exclusive bounds": record(n={"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}),
    "multiple": record(n={"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 40}),
    "any of": record(v={"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, TEXT]}),
    "any of objects": {
        "anyOf": [record(kind={"const": "cat"}, lives={"const": 9}), record(kind={"const": "dog"})]
    },
    "one of": {
        "oneOf": [
            record(kind={"const": "a"}, x={"type": "boolean"}),
            record(kind={"const": "b"}, y={"type": "boolean"}),
        ]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 7}]},
    "reference": {**record(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"}), "$defs": {"p": TEXT}},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "optional properties": {
        "type": "object",
        "properties": {"a": TEXT, "b": {"type": "boolean"}, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "additional properties": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
    },
    "pattern": record(plate={"type": "string", "pattern": "^[A-Z]{1,3}-[0-9]{1,4}$"}),
    "formats": record(
        day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}
    ),
    "unicode": record(**{"größe": {"enum": ["groß", "klein"]}, "🚂": {"const": "日本"}}),
    "escapes": record(**{'a"b\\c\n': {"const": 'say "no"\t/'}}),
    "nullable": record(v={"type": ["string", "null"], "maxLength": 12}),
    "length of text": record(t={"type": "string", "minLength": 5, "maxLength": 8}),
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x_[a-c]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
}
REGEXES = {
    "telephone": r"\+[0-9]{2} [0-9]{3,5} [0-9]{4,8}",
    "anchored": "^(yes|no|maybe)$",
    "letters": "[a-zäöü]{3,10}!?",
    "address": r"\d{1,3}(\.\d{1,3}){3}",
    "all scripts": r"[\p{Han}\p{Cyrillic}]{2,4}",
}
CHOICES = (["Paris", "Berlin", "Saint-Étienne"], ["a", "ab", "abc"], ['"', "\\", "\n", "日本 🚂"])


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Router]:
    options = EngineOptions(embedded().path, "smollm2", kv_tokens=8192, sequences_max=32)
    worker = Worker(
        lambda: load("llamacpp", options, lambda _fraction: None), f"unix://{folder}/w.sock"
    )
    await worker.start()
    try:
        async with Router(Settings(), [GroupSpec("g", None, (worker.address,))]) as router:
            await router.fleet.wait_ready()
            yield router
    finally:
        await worker.stop()


async def finish(router: Router, ask: Ask) -> Finish:
    async with await router.service.generate(ask) as generation:
        async for chunk in generation:
            if chunk.finish is not None:
                return chunk.finish
    raise AssertionError("no end")


def asks(constraint: Constraint, topic: str) -> tuple[Ask, Ask]:
    """The same greedily and with chance."""
    prompt = QUESTION.format(topic)
    ways = (Params(temperature=0.0), Params(temperature=1.2, seed=7, top_p=0.95))
    greedy, chance = (
        Ask(
            prompt,
            Params(
                max_tokens=TOKENS_MAX,
                temperature=way.temperature,
                seed=way.seed,
                top_p=way.top_p,
                constraint=constraint,
            ),
        )
        for way in ways
    )
    return greedy, chance


async def answers(router: Router, made: dict[str, Constraint]) -> dict[str, list[Finish]]:
    """Two answers for each constraint, all asked for at once."""
    names = [name for name in made for _ in range(2)]
    calls = [finish(router, ask) for name in made for ask in asks(made[name], "trains")]
    async with asyncio.timeout(PATIENCE_S):
        done = await asyncio.gather(*calls)
    found: dict[str, list[Finish]] = {}
    for name, answer in zip(names, done, strict=True):
        found.setdefault(name, []).append(answer)
    return found


def complete(answer: Finish) -> bool:
    """Whether the answer ended by itself; otherwise its limit is the reason, and says so."""
    if answer.reason is Reason.EOS:
        return True
    assert answer.reason is Reason.LENGTH
    assert answer.generated_tokens == TOKENS_MAX
    return False


async def test_every_answer_is_valid_by_its_schema(tmp_path: Path) -> None:
    made = {name: constraints.json_schema(SCHEMAS[name], "f") for name in SCHEMAS}
    cut = 0
    async with running(tmp_path) as router:
        found = await answers(router, made)
    for name, pair in found.items():
        for answer in pair:
            if not complete(answer):
                cut += 1
                continue
            try:
                jsonschema.validate(json.loads(answer.text), SCHEMAS[name])
            except ValueError as error:
                raise AssertionError(f"{name}: {answer.text!r}: {error}") from error
    # What has no bound of its own may go on; most of these have one.
    assert cut <= 6


async def test_every_answer_is_an_object_or_matches_or_is_a_choice(tmp_path: Path) -> None:
    made = {f"regex {name}": constraints.regex(REGEXES[name], "f") for name in REGEXES}
    made |= {f"choice {n}": constraints.choice(texts, "f") for n, texts in enumerate(CHOICES)}
    made["object"] = constraints.json_object("f")
    made["grammar"] = constraints.grammar('root ::= ("ha " | "ho ")+ "!" "\\u00e9"', "f")
    async with running(tmp_path) as router:
        found = await answers(router, made)
        with pytest.raises(RequestError) as caught:
            await router.service.generate(asks(constraints.regex("(", "guided_regex"), "x")[0])
    for name, pair in found.items():
        for answer in filter(complete, pair):
            kind, _, which = name.partition(" ")
            if kind == "object":
                assert isinstance(json.loads(answer.text), dict)
            elif kind == "grammar":
                assert re.fullmatch("(ha |ho )+!é", answer.text)
            elif kind == "choice":
                assert answer.text in CHOICES[int(which)]
            elif which == "all scripts":
                assert 2 <= len(answer.text) <= 4
            else:
                assert re.fullmatch(REGEXES[which], answer.text, re.ASCII), (name, answer.text)
    assert all(complete(answer) for name in found for answer in found[name] if "choice" in name)
    assert caught.value.fault is Fault.VALIDATION
    assert caught.value.field == "guided_regex"
    assert "unclosed group" in caught.value.message
