"""Forced calls and formats with the small model, which by itself writes neither."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openai import OpenAI

from tests.service.chat_bench import HERMES, MISTRAL
from tests.system.server import REQUEST_S, serving

TRAIN: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "maxLength": 20},
        "seats": {"type": "integer", "minimum": 1, "maximum": 9},
        "class": {"$ref": "#/$defs/class"},
        "stops": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 2},
    },
    "required": ["to", "seats", "class"],
    "additionalProperties": False,
    "$defs": {"class": {"enum": ["first", "second"]}},
}
WHEN: dict[str, Any] = {
    "type": "object",
    "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}},
    "required": ["hour"],
    "additionalProperties": False,
}
SCHEMAS = {"book_train": TRAIN, "set_alarm": WHEN, "stop": {"type": "object", "properties": {}}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "description": f"Can {name}.", "parameters": schema},
    }
    for name, schema in SCHEMAS.items()
]
ASKED: list[Any] = [{"role": "user", "content": "Book a train to Paris for two people."}]
FORMATS = {"json": None, "hermes": HERMES, "mistral": MISTRAL}


@pytest.fixture(scope="module", params=FORMATS)
def openai(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    """A client of the model with a template of its own, or with one of this format."""
    folder: Path = tmp_path_factory.mktemp("chat")
    options = []
    template = FORMATS[request.param]
    if template is not None:
        path = folder / "template.jinja"
        path.write_text(template)
        options = ["--chat-template", str(path)]
    with (
        serving(folder, *options) as server,
        OpenAI(
            base_url=f"{server.rest}/v1", api_key="-", timeout=REQUEST_S, max_retries=0
        ) as client,
    ):
        yield client


def check(name: str, arguments: str) -> None:
    Draft202012Validator(SCHEMAS[name]).validate(json.loads(arguments))


@pytest.mark.parametrize("seed", range(2))
def test_required_calls_validate(openai: OpenAI, seed: int) -> None:
    answer = openai.chat.completions.create(
        model="tgi",
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        seed=seed,
        temperature=1.0,
        max_tokens=400,
        parallel_tool_calls=bool(seed % 2),
    )
    (choice,) = answer.choices
    assert not choice.message.content
    calls = choice.message.tool_calls
    assert calls
    assert seed % 2 or len(calls) == 1
    whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
    assert whole or choice.finish_reason == "length"
    for call in whole:
        assert call.type == "function"
        check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("name", ["book_train", "stop"])
def test_a_named_call_is_streamed_and_validates(openai: OpenAI, name: str) -> None:
    stream = openai.chat.completions.create(
        model="tgi",
        messages=ASKED,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": name}},
        temperature=0,
        max_tokens=200,
        stream=True,
    )
    names, arguments, text, reason = [], "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                assert call.index == 0
                assert call.function is not None
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    assert (names, text, reason) == ([name], "", "tool_calls")
    check(name, arguments)


def test_a_forced_response_validates(openai: OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    got = openai.responses.create(
        model="tgi",
        input=ASKED,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=200,
    )
    (call,) = got.output
    assert call.type == "function_call"
    assert got.status == "completed"
    check(call.name, call.arguments)


def test_a_formatted_response_validates(openai: OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "train", "schema": TRAIN}}
    with openai.responses.stream(
        model="tgi", input=ASKED, text=text, temperature=0, max_output_tokens=200
    ) as stream:
        got = stream.until_done().get_final_response()
    assert got.status == "completed"
    check("book_train", got.output_text)


def test_a_model_that_is_free_answers(openai: OpenAI) -> None:
    answer = openai.chat.completions.create(
        model="tgi", messages=ASKED, tools=TOOLS, temperature=0, max_tokens=24
    )
    (choice,) = answer.choices
    assert choice.message.content or choice.message.tool_calls
