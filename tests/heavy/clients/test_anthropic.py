"""The anthropic package: messages, streams, tools, counts and errors."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic import Anthropic, AsyncAnthropic

from tests.heavy.clients.world import (
    ABOUT,
    KEY,
    LIMIT,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    QUESTION,
    SCHEMAS,
    TEXTS,
    TOOL_TOKENS,
    USER,
)
from tests.system.server import Server

# The package's makers no longer let their newest models be asked for a temperature.
GREEDY = {"temperature": 0}
ASK: dict[str, Any] = {
    "model": "tgi",
    "messages": USER,
    "max_tokens": 24,
    "extra_body": GREEDY,
}
TOOLS: list[dict[str, Any]] = [
    {"name": name, "description": ABOUT[name], "input_schema": schema}
    for name, schema in SCHEMAS.items()
]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
CALL = {**ASK, "messages": ASKED, "tools": TOOLS, "max_tokens": TOOL_TOKENS}
MUST = {"type": "any"}


@pytest.fixture
def client(server: Server) -> Iterator[Anthropic]:
    with Anthropic(
        base_url=server.rest,
        api_key=KEY,
        timeout=PATIENCE_S,
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture
async def patient(server: Server) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        base_url=server.rest,
        api_key=KEY,
        timeout=PATIENCE_S,
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def check(content: Any) -> list[Any]:
    """The calls of an answer, which validate and have ids of their own."""
    calls = [block for block in content if block.type == "tool_use"]
    for call in calls:
        jsonschema.validate(call.input, SCHEMAS[call.name])
    assert len({call.id for call in calls}) == len(calls)
    return calls


@pytest.mark.both_ways
def test_an_answer(client: Anthropic) -> None:
    answer = client.messages.create(**ASK)
    assert answer.id.startswith("msg_")
    assert (answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn")
    assert answer.stop_sequence is None
    (block,) = answer.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert answer.usage.input_tokens > 10
    assert answer.usage.output_tokens > 3


@pytest.mark.both_ways
def test_events_come_in_order_and_say_the_same(client: Anthropic) -> None:
    whole = client.messages.create(**ASK)
    events = list(client.messages.create(**ASK, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]  # type: ignore[comparison-overlap]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert deltas > 3
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [text] == [block.text for block in whole.content if block.type == "text"]
    assert [block.text for block in final.content if block.type == "text"] == [text]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_system_turns_and_stop_sequences(client: Anthropic) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello, how can I help?"}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    system = [{"type": "text", "text": "You know all capitals."}]
    answer = client.messages.create(**{**ASK, "messages": turns}, system=system)  # type: ignore[arg-type]
    assert answer.content
    cut = client.messages.create(**ASK, stop_sequences=["Paris"])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "Paris")
    assert "Paris" not in cut.content[0].text  # type: ignore[union-attr]
    short = client.messages.create(**{**ASK, "max_tokens": 1})
    assert short.stop_reason == "max_tokens"
    assert short.usage.output_tokens == 1


def test_a_begun_answer_is_continued(client: Anthropic) -> None:
    turns = [*USER, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.messages.create(**{**ASK, "messages": turns, "max_tokens": 4})
    assert answer.content[0].text.startswith(" Paris")  # type: ignore[union-attr]


@pytest.mark.parametrize("choice", [MUST, {"type": "tool", "name": "add"}])
@pytest.mark.parametrize("temperature", [0, 1])
def test_forced_calls_validate(client: Anthropic, choice: Any, temperature: float) -> None:
    answer = client.messages.create(
        **{**CALL, "extra_body": {"temperature": temperature}}, tool_choice=choice
    )
    calls = check(answer.content)
    assert calls
    assert answer.stop_reason == "tool_use"
    if choice is not MUST:
        assert {call.name for call in calls} == {"add"}


@pytest.mark.both_ways
def test_streamed_calls_are_whole_calls(client: Anthropic) -> None:
    with client.messages.stream(**CALL, tool_choice=MUST) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    calls = check(final.content)
    assert calls
    assert json.loads("".join(pieces)) == calls[0].input or len(calls) > 1
    assert final.stop_reason == "tool_use"


def test_one_call_none_and_free(client: Anthropic) -> None:
    alone = {**MUST, "disable_parallel_tool_use": True}
    answer = client.messages.create(**CALL, tool_choice=alone)
    assert len(check(answer.content)) == 1
    fields = {**CALL, "max_tokens": 24}
    silent = client.messages.create(**fields, tool_choice={"type": "none"})
    assert {block.type for block in silent.content} == {"text"}
    free = client.messages.create(**fields, tool_choice={"type": "auto"})
    assert free.stop_reason in ("end_turn", "tool_use", "max_tokens")


def test_the_whole_way_round(client: Anthropic) -> None:
    first = client.messages.create(**CALL, tool_choice=MUST)
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": '{"celsius": 21}'}
        for call in check(first.content)
    ]
    turns = [
        *ASKED,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    answer = client.messages.create(
        **{**CALL, "messages": turns, "max_tokens": 24}, tool_choice={"type": "none"}
    )
    assert answer.content[0].type == "text"


def test_a_schema_for_the_answer(client: Anthropic) -> None:
    output = {"format": {"type": "json_schema", "schema": PERSON}}
    turns = [{"role": "user", "content": "Describe a person."}]
    answer = client.messages.create(
        **{**ASK, "messages": turns, "max_tokens": PERSON_TOKENS},
        output_config=output,  # type: ignore[arg-type]
    )
    assert answer.stop_reason == "end_turn"
    jsonschema.validate(json.loads(answer.content[0].text), PERSON)  # type: ignore[union-attr]


@pytest.mark.repeatable
@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken_and_streamed_whole(client: Anthropic, text: str) -> None:
    fields = {**ASK, "messages": [{"role": "user", "content": text}], "max_tokens": 6}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        said = "".join(stream.text_stream)
    assert said == "".join(block.text for block in whole.content if block.type == "text")


@pytest.mark.both_ways
def test_counting_tokens(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model="tgi", messages=USER)  # type: ignore[arg-type]
    assert counted.input_tokens == client.messages.create(**ASK).usage.input_tokens


@pytest.mark.both_ways
def test_errors(client: Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**{**ASK, "extra_body": {"temperature": -1}})
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**ASK, "messages": []})
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**ASK, "max_tokens": LIMIT + 1}, stream=True)
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**ASK, "model": "no-such-model"})
    body = missing.value.body
    assert body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError) as denied:
        Anthropic(base_url=server.rest, api_key="wrong").messages.create(**ASK)
    body = denied.value.body
    assert body["error"]["type"] == "authentication_error"


async def test_asynchronous(patient: AsyncAnthropic) -> None:
    whole = await patient.messages.create(**ASK)
    async with patient.messages.stream(**ASK) as stream:
        pieces = [piece async for piece in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(pieces) == whole.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens == whole.usage.output_tokens
    forced = await patient.messages.create(**CALL, tool_choice=MUST)
    assert check(forced.content)
