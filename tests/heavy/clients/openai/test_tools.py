"""The openai package: tools, forced and free, the whole way round, and structured answers."""

import json
from typing import Any, Literal

import jsonschema
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, ConfigDict, Field

from tests.heavy.clients.world import (
    PERSON,
    PERSON_TOKENS,
    SCHEMAS,
    TOOL_TOKENS,
    TOOLS,
)

ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL: dict[str, Any] = {
    "model": "tgi",
    "messages": ASKED,
    "tools": TOOLS,
    "max_tokens": TOOL_TOKENS,
    "temperature": 0,
}
NAMED = {"type": "function", "function": {"name": "add"}}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": PERSON, "strict": True},
}
DESCRIBE = [{"role": "user", "content": "Describe a person."}]
SAY: dict[str, Any] = {
    "model": "tgi",
    "messages": DESCRIBE,
    "max_tokens": PERSON_TOKENS,
    "temperature": 0,
}


class Person(BaseModel):
    """A person, as pydantic has it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    mood: Literal["glad", "sad"]


def check(calls: Any) -> None:
    """Every call has an id of its own, and arguments that validate."""
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.id
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_forced_calls_validate(client: OpenAI, choice: Any, temperature: float) -> None:
    fields = {**CALL, "temperature": temperature, "seed": 1}
    answer = client.chat.completions.create(**fields, tool_choice=choice)
    (made,) = answer.choices
    check(made.message.tool_calls)
    assert made.message.content in (None, "")
    if choice is NAMED:
        assert {call.function.name for call in made.message.tool_calls or ()} == {"add"}
        assert made.finish_reason in ("stop", "tool_calls")
    else:
        assert made.finish_reason == "tool_calls"


@pytest.mark.both_ways
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_streamed_calls_are_whole_calls(client: OpenAI, choice: Any) -> None:
    ids: dict[int, str] = {}
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    reason = None
    for chunk in client.chat.completions.create(**CALL, tool_choice=choice, stream=True):
        (made,) = chunk.choices
        reason = made.finish_reason or reason
        for delta in made.delta.tool_calls or ():
            assert delta.function is not None
            if delta.index not in ids:
                assert delta.id
                assert delta.function.name
                ids[delta.index], names[delta.index] = delta.id, delta.function.name
                arguments[delta.index] = ""
            else:
                assert delta.id in (None, ids[delta.index])
                assert not delta.function.name
            arguments[delta.index] += delta.function.arguments or ""
    assert list(ids) == list(range(len(ids)))
    assert ids
    assert len(set(ids.values())) == len(ids)
    for index, name in names.items():
        jsonschema.validate(json.loads(arguments[index]), SCHEMAS[name])
    if choice is NAMED:
        assert set(names.values()) == {"add"}
        assert reason in ("stop", "tool_calls")
    else:
        assert reason == "tool_calls"


def test_the_streaming_helper_parses_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(**CALL, tool_choice="required") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    check(final.choices[0].message.tool_calls)


def test_one_call_at_a_time(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        **CALL, tool_choice="required", parallel_tool_calls=False
    )
    check(answer.choices[0].message.tool_calls)
    assert len(answer.choices[0].message.tool_calls or ()) == 1


def test_none_is_no_call_and_auto_is_the_models_choice(client: OpenAI) -> None:
    fields = {**CALL, "max_tokens": 32}
    answer = client.chat.completions.create(**fields, tool_choice="none").choices[0]
    assert not answer.message.tool_calls
    assert answer.message.content
    free = client.chat.completions.create(**fields, tool_choice="auto").choices[0]
    if free.message.tool_calls:
        assert free.finish_reason in ("tool_calls", "length")
    else:
        assert free.message.content
        assert free.finish_reason in ("stop", "length")


def test_the_whole_way_round(client: OpenAI) -> None:
    """The client's own message goes back as it came, with a result for each call."""
    first = client.chat.completions.create(**CALL, tool_choice="required").choices[0].message
    check(first.tool_calls)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 21}'}
        for call in first.tool_calls or ()
    ]
    messages = [*ASKED, first.model_dump(exclude_none=True), *results]
    answer = client.chat.completions.create(
        model="tgi",
        messages=messages,
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="none",
        max_tokens=24,
        temperature=0,
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls
    again = client.chat.completions.create(
        **{**CALL, "messages": [*ASKED, first, *results]}, tool_choice="required"
    )
    check(again.choices[0].message.tool_calls)


def test_pydantic_tools_are_parsed(client: OpenAI) -> None:
    tool = pydantic_function_tool(Person)
    answer = client.chat.completions.parse(
        **{**CALL, "tools": [tool]},
        tool_choice={"type": "function", "function": {"name": "Person"}},
    )
    for call in answer.choices[0].message.tool_calls or ():
        assert isinstance(call.function.parsed_arguments, Person)
    assert answer.choices[0].message.tool_calls


@pytest.mark.both_ways
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_for_the_answer(client: OpenAI, temperature: float) -> None:
    fields = {**SAY, "temperature": temperature, "seed": 2}
    answer = client.chat.completions.create(**fields, response_format=FORMAT)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(str(answer.choices[0].message.content)), PERSON)


@pytest.mark.both_ways
def test_a_pydantic_class_for_the_answer(client: OpenAI) -> None:
    answer = client.chat.completions.parse(**SAY, response_format=Person)
    assert isinstance(answer.choices[0].message.parsed, Person)
    with client.chat.completions.stream(**SAY, response_format=Person) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


def test_any_json_object(client: OpenAI) -> None:
    """What is free has no end of its own; if it ended, it is an object."""
    answer = client.chat.completions.create(**SAY, response_format={"type": "json_object"}).choices[
        0
    ]
    text = str(answer.message.content)
    assert text.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
    else:
        assert answer.finish_reason == "length"


@pytest.mark.both_ways
def test_a_streamed_schema_and_several_answers(client: OpenAI) -> None:
    texts = {0: "", 1: ""}
    fields = {**SAY, "temperature": 1.3, "seed": 4, "n": 2}
    for chunk in client.chat.completions.create(**fields, response_format=FORMAT, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts.values():
        jsonschema.validate(json.loads(text), PERSON)


async def test_asynchronous(patient: AsyncOpenAI) -> None:
    answer = await patient.chat.completions.create(**CALL, tool_choice="required")
    check(answer.choices[0].message.tool_calls)
    parsed = await patient.chat.completions.parse(**SAY, response_format=Person)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    async with patient.chat.completions.stream(**CALL, tool_choice="required") as stream:
        final = await stream.get_final_completion()
    check(final.choices[0].message.tool_calls)
