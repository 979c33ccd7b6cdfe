"""The openai package: responses, which keep nothing on the server."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel, ConfigDict, Field

from tests.heavy.clients.world import (
    ABOUT,
    PERSON,
    PERSON_TOKENS,
    QUESTION,
    SCHEMAS,
    TOOL_TOKENS,
)

ASK: dict[str, Any] = {
    "model": "tgi",
    "input": QUESTION,
    "max_output_tokens": 24,
    "temperature": 0,
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "name": name,
        "description": ABOUT[name],
        "parameters": schema,
        "strict": True,
    }
    for name, schema in SCHEMAS.items()
]
CALL = {
    **ASK,
    "input": "What is the weather in Paris?",
    "tools": TOOLS,
    "max_output_tokens": TOOL_TOKENS,
}
FORMAT = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
DESCRIBE = {**ASK, "input": "Describe a person.", "max_output_tokens": PERSON_TOKENS}


class Person(BaseModel):
    """A person, as pydantic has it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]


def calls_of(answer: Response) -> list[ResponseFunctionToolCall]:
    """The calls of an answer, each of which validates and has an id of its own."""
    calls = [item for item in answer.output if isinstance(item, ResponseFunctionToolCall)]
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert len({call.call_id for call in calls}) == len(calls)
    return calls


@pytest.mark.both_ways
def test_an_answer(client: OpenAI) -> None:
    answer = client.responses.create(**ASK)
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.status) == ("response", "completed")
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", "completed")
    assert "Paris" in answer.output_text
    usage = answer.usage
    assert usage is not None
    assert usage.input_tokens + usage.output_tokens == usage.total_tokens
    assert client.responses.create(**ASK).id != answer.id


@pytest.mark.both_ways
def test_events_come_in_order_and_say_the_same(client: OpenAI) -> None:
    whole = client.responses.create(**ASK)
    events = list(client.responses.create(**ASK, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[4:-4] == ["response.output_text.delta"] * len(deltas)
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == whole.output_text
    assert len({event.item_id for event in deltas}) == 1


def test_the_streaming_helper_gathers_it(client: OpenAI) -> None:
    with client.responses.stream(**ASK) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == client.responses.create(**ASK).output_text


def test_instructions_and_turns(client: OpenAI) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    answer = client.responses.create(**{**ASK, "input": turns}, instructions="Be brief.")
    assert answer.output_text
    assert answer.instructions == "Be brief."
    plain = client.responses.create(**{**ASK, "input": turns})
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.input_tokens > plain.usage.input_tokens


def test_an_answer_that_was_cut_says_so(client: OpenAI) -> None:
    answer = client.responses.create(**{**ASK, "max_output_tokens": 2})
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**{**ASK, "max_output_tokens": 2}, stream=True)
    assert last.type == "response.incomplete"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_forced_calls_validate_whole_and_streamed(client: OpenAI, choice: Any) -> None:
    answer = client.responses.create(**CALL, tool_choice=choice)
    calls = calls_of(answer)
    assert calls
    if choice != "required":
        assert {call.name for call in calls} == {"add"}
    streamed: list[ResponseFunctionToolCall] = []
    pieces: dict[str, str] = {}
    done: dict[str, str] = {}
    for event in client.responses.create(**CALL, tool_choice=choice, stream=True):
        if event.type == "response.function_call_arguments.delta":
            pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
        elif event.type == "response.function_call_arguments.done":
            done[event.item_id] = event.arguments
        elif event.type == "response.completed":
            streamed = calls_of(event.response)
    assert pieces == done
    assert list(done.values()) == [call.arguments for call in streamed]
    assert streamed


def test_the_whole_way_round(client: OpenAI) -> None:
    """Nothing is stored, so the client sends back what it got, and the results."""
    first = client.responses.create(**CALL, tool_choice="required")
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": '{"celsius": 21}'}
        for call in calls_of(first)
    ]
    assert results
    asked = {"role": "user", "content": CALL["input"]}
    turns = [asked, *(item.model_dump(exclude_none=True) for item in first.output), *results]
    answer = client.responses.create(**{**ASK, "input": turns}, tools=TOOLS, tool_choice="none")
    assert answer.output_text
    assert calls_of(answer) == []


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_for_the_answer(client: OpenAI, temperature: float) -> None:
    answer = client.responses.create(**{**DESCRIBE, "temperature": temperature}, text=FORMAT)
    assert answer.status == "completed"
    jsonschema.validate(json.loads(answer.output_text), PERSON)


def test_a_pydantic_class_for_the_answer(client: OpenAI) -> None:
    answer = client.responses.parse(**DESCRIBE, text_format=Person)
    assert isinstance(answer.output_parsed, Person)
    with client.responses.stream(**DESCRIBE, text_format=Person) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, Person)


def test_what_needs_a_store_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASK, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**ASK, background=True)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**ASK, tools=[{"type": "web_search"}])
    assert str(caught.value.param).startswith("tools")
    with pytest.raises(openai.APIStatusError) as gone:
        client.responses.retrieve("resp_1")
    assert gone.value.status_code in (404, 405)


async def test_asynchronous(patient: AsyncOpenAI) -> None:
    answer = await patient.responses.create(**ASK)
    pieces = [
        event.delta
        async for event in await patient.responses.create(**ASK, stream=True)
        if event.type == "response.output_text.delta"
    ]
    assert "".join(pieces) == answer.output_text
    parsed = await patient.responses.parse(**DESCRIBE, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
