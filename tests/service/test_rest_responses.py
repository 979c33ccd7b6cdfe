"""OpenAI's responses, read by OpenAI's own client."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import openai
import pytest
from openai.types import responses as kinds
from openai.types.responses.response_stream_event import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason
from router.errors import Fault, RequestError
from tests.service.chat_bench import HERMES, THINKER, TemplateService, said, tokenizer
from tests.service.fake_service import FakeFleet, Step, words
from tests.service.rest_server import client_of, serving

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def model(template: str, *scripts: Sequence[Step]) -> TemplateService:
    service = TemplateService(*scripts)
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(template)
    return service


@asynccontextmanager
async def sdk(service: TemplateService) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(service) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


async def posted(service: TemplateService, **body: Any) -> tuple[int, Any]:
    async with client_of(service) as client:
        response = await client.post("/v1/responses", json={"input": "Hi", **body})
    return response.status_code, response.json()


async def streamed(service: TemplateService, **body: Any) -> list[Any]:
    """The events of a stream, each checked to be one that OpenAI's client knows."""
    async with client_of(service) as client:
        response = await client.post("/v1/responses", json={"input": "Hi", "stream": True, **body})
    assert response.status_code == 200
    blocks = [block for block in response.text.split("\n\n") if block]
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        checked = EVENTS.validate_python(event, strict=True)
        assert checked.type == event["type"]
        # Earlier releases of the client wanted the name, too.
        named = event["type"] == "response.function_call_arguments.done"
        assert set(checked.model_extra or ()) == ({"name"} if named else set())
        events.append(event)
    return events


async def test_a_whole_answer() -> None:
    service = model(HERMES, words(("It", " rains"), Reason.EOS))
    async with sdk(service) as client:
        got = await client.responses.create(
            model="m/one",
            input="How is the weather?",
            instructions="Be brief.",
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=20,
            metadata={"a": "b"},
            service_tier="flex",
            user="me",
            truncation="disabled",
            store=False,
        )
    assert got.output_text == "It rains"
    assert (got.status, got.error, got.incomplete_details) == ("completed", None, None)
    assert (got.model, got.metadata, got.service_tier) == ("m/one", {"a": "b"}, "flex")
    assert (got.instructions, got.user, got.temperature) == ("Be brief.", "me", 0.5)
    assert (got.max_output_tokens, got.truncation) == (20, "disabled")
    assert got.usage is not None
    assert (got.usage.input_tokens, got.usage.output_tokens, got.usage.total_tokens) == (7, 2, 9)
    assert got.usage.input_tokens_details.cached_tokens == 2
    (item,) = got.output
    assert isinstance(item, kinds.ResponseOutputMessage)
    assert (item.role, item.status) == ("assistant", "completed")
    (ask,) = service.asks
    assert str(ask.prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert (ask.params.temperature, ask.params.top_p) == (0.5, 0.9)
    assert (ask.params.max_tokens, ask.priority) == (20, 2)


async def test_the_answer_is_what_openais_client_says_it_is() -> None:
    _, got = await posted(model(HERMES, words()))
    checked = kinds.Response.model_validate(got, strict=True)
    assert checked.model_extra == {"store": False}  # OpenAI sends it, too
    missing = {
        name for name, field in kinds.Response.model_fields.items() if field.is_required()
    } - got.keys()
    assert not missing


async def test_a_stream_has_every_event_in_order() -> None:
    service = model(THINKER, said("Hm", "m.", "</think>\n\nI look.\n", CALL, reason=Reason.EOS))
    events = await streamed(service, tools=[WEATHER])
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in events if "output_index" in event] == [
        *[0] * 7, *[1] * 6, *[2] * 4
    ]  # fmt: skip
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert last["id"] == first["id"]
    thoughts, message, call = last["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert message["content"][0]["text"] == "I look."
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city": "Köln"}')
    assert call["call_id"].startswith("call_")
    assert len({item["id"] for item in last["output"]}) == 3
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]


async def test_whole_and_streamed_answers_are_alike() -> None:
    pieces = said("Hmm.</think>I look.", CALL, CALL, " Done.")
    _, whole = await posted(model(THINKER, pieces), tools=[WEATHER])
    last = (await streamed(model(THINKER, pieces), tools=[WEATHER]))[-1]["response"]
    for one in (whole, last):
        for item in one["output"]:
            del item["id"]
            item.pop("call_id", None)
        del one["id"], one["created_at"], one["completed_at"]
    assert whole == last
    kinds_of = [item["type"] for item in whole["output"]]
    assert kinds_of == ["reasoning", "message", "function_call", "function_call", "message"]


async def test_the_clients_stream_puts_it_together() -> None:
    service = model(HERMES, said("I look.\n", CALL[:60], CALL[60:]))
    async with (
        sdk(service) as client,
        client.responses.stream(model="m/one", input="Hi", tools=[WEATHER]) as stream,  # type: ignore[list-item]
    ):
        async for event in stream:
            assert event.type != "error"
        got = await stream.get_final_response()
    message, call = got.output
    assert got.output_text == "I look."
    assert message.type == "message"
    assert call.type == "function_call"
    assert call.parsed_arguments == {"city": "Köln"}


class Person(BaseModel):
    name: str
    age: int


async def test_a_format_is_a_constraint_and_parsed_by_the_client() -> None:
    service = model(HERMES, said('{"name": "Ann", "age": 3}'))
    async with sdk(service) as client:
        got = await client.responses.parse(model="m/one", input="Hi", text_format=Person)
    assert got.output_parsed == Person(name="Ann", age=3)
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert json.loads(constraint.text)["required"] == ["name", "age"]
    status, got_raw = await posted(service, text={"format": {"type": "json_object"}})
    assert (status, got_raw["text"]) == (200, {"format": {"type": "json_object"}})
    constraint = service.asks[1].params.constraint
    assert constraint is not None
    assert json.loads(constraint.text) == {"type": "object"}


async def test_calls_and_their_results_go_back_and_forth() -> None:
    service = model(HERMES, said("Hm.", CALL), said("It rains."))
    async with sdk(service) as client:
        first = await client.responses.create(model="m/one", input="Weather?", tools=[WEATHER])  # type: ignore[list-item]
        call = first.output[-1]
        assert isinstance(call, kinds.ResponseFunctionToolCall)
        items: list[Any] = [
            {"role": "user", "content": "Weather?"},
            *first.output,
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ]
        second = await client.responses.create(model="m/one", input=items, tools=[WEATHER])  # type: ignore[list-item]
    assert second.output_text == "It rains."
    prompt = str(service.asks[1].prompt)
    assert f"assistant\nHm.{CALL}<|im_end|>\n<|im_start|>tool\nrain<|im_end|>" in prompt
    assert '"name": "get_weather"' in prompt


async def test_a_turn_is_put_together_of_its_items() -> None:
    template = "{% for m in messages %}[{{ m | tojson }}]{% endfor %}"
    service = model(template, said("a"))
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    thought = {
        "type": "reasoning", "id": "r", "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }  # fmt: skip
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}
    text = {"type": "output_text", "text": "b", "annotations": []}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "x"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        thought,
        {"type": "message", "role": "assistant", "content": [text]},
        summed,
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        call,
        {"type": "function_call_output", "call_id": "c", "output": [
            {"type": "input_text", "text": "d"}
        ]},
    ]  # fmt: skip
    status, _ = await posted(service, input=items, instructions="i")
    assert status == 200
    prompt = str(service.asks[0].prompt)
    roles = [message["role"] for message in service_messages(prompt)]
    assert roles == ["system", "user", "assistant", "assistant", "assistant", "user"]
    system, _, first, second, third, _ = service_messages(prompt)
    assert system["content"] == "i\n\nx"
    assert (first["reasoning_content"], first["content"]) == ("hm", "b")
    assert (second["reasoning_content"], second["content"]) == ("so", "c")
    assert third["content"].startswith("no\n\n")


def service_messages(prompt: str) -> list[dict[str, Any]]:
    """What the template above wrote down."""
    return list(json.loads(f"[{prompt.replace('][', ',')[1:-1]}]"))


@pytest.mark.parametrize("status", ["completed", "incomplete", "in_progress"])
async def test_a_last_message_of_the_assistant_is_history(status: str) -> None:
    """The model answers it: a client that sends an answer back does not ask for its end."""
    service = model(HERMES, said("It is."))
    last = {"role": "assistant", "content": "Paris", "status": status}
    code, got = await posted(service, input=[{"role": "user", "content": "Where?"}, last])
    assert (code, got["output"][0]["content"][0]["text"]) == (200, "It is.")
    assert str(service.asks[0].prompt).endswith(
        "assistant\nParis<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_log_probabilities_of_the_text_alone() -> None:
    def chunk(text: str, finish: Finish | None = None) -> Chunk:
        top = ((1, "x", -1.5), (2, "y", float("-inf")))
        return Chunk((TokenOut(1, text, False, -0.5, top),), text, finish)

    pieces = ("Hm", "</think>", "It", " rains")
    finish = Finish(Reason.EOS, "".join(pieces), 7, 4)
    script = [*map(chunk, pieces[:-1]), chunk(pieces[-1], finish)]
    service = model(THINKER, script)
    body = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    events = await streamed(service, **body)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    told = [[entry["token"] for entry in event["logprobs"]] for event in deltas]
    assert told[-1] == [" rains"]
    assert told[0][-1] == "It"
    part = events[-1]["response"]["output"][1]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == [*chain(*told)]
    assert part["logprobs"][-1]["top_logprobs"] == [
        {"token": "x", "logprob": -1.5, "bytes": [120]},
        {"token": "y", "logprob": -9999.0, "bytes": [121]},
    ]
    assert service.asks[0].params.top_logprobs == 2
    _, got = await posted(model(HERMES, words()))
    assert got["output"][0]["content"][0]["logprobs"] == []


async def test_an_answer_that_reaches_its_length_is_incomplete() -> None:
    for pieces, kind in ((("It",), "message"), ((CALL[:-20],), "function_call")):
        service = model(HERMES, said(*pieces, reason=Reason.LENGTH))
        events = await streamed(service, tools=[WEATHER])
        assert events[-1]["type"] == "response.incomplete"
        got = events[-1]["response"]
        assert got["incomplete_details"] == {"reason": "max_output_tokens"}
        assert got["status"] == got["output"][-1]["status"] == "incomplete"
        assert got["output"][-1]["type"] == kind
        assert got["usage"]["output_tokens"] == 1


async def test_a_call_that_breaks_off_is_incomplete() -> None:
    """Whatever comes behind it: a client must not take it for one to be made."""
    broken = CALL.replace('"Köln"', "")
    scripts = [said(f"{broken} so\n{CALL}"), said(f"{CALL}\n{broken}")]
    for script, statuses in zip(
        scripts,
        (["incomplete", "completed"], ["completed", "incomplete"]),
        strict=True,
    ):
        _, got = await posted(model(HERMES, script), tools=[WEATHER])
        calls = [item for item in got["output"] if item["type"] == "function_call"]
        assert [call["status"] for call in calls] == statuses
        events = await streamed(model(HERMES, script), tools=[WEATHER])
        ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert [item["status"] for item in ended if item["type"] == "function_call"] == statuses


async def test_an_item_whose_type_is_null_is_a_message() -> None:
    service = model(HERMES, said("Yes"))
    status, _ = await posted(service, input=[{"type": None, "role": "user", "content": "Well?"}])
    assert status == 200
    assert "user\nWell?" in str(service.asks[0].prompt)


async def test_an_empty_answer_has_an_empty_message() -> None:
    _, got = await posted(model(HERMES, said("")))
    assert got["output"][0]["content"][0]["text"] == ""


async def test_thoughts_are_counted() -> None:
    script = words(("Hm", "m", "</think>", "Yes"), Reason.EOS)
    _, got = await posted(model(THINKER, script))
    assert got["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize(
    ("fault", "code"),
    [(Fault.WORKER_LOST, "server_error"), (Fault.VALIDATION, "invalid_prompt")],
)
async def test_a_stream_that_fails_says_so(fault: Fault, code: str) -> None:
    broken = RequestError(fault, "the worker is gone")
    events = await streamed(model(HERMES, [*words()[:1], broken]))
    assert events[-1]["type"] == "response.failed"
    got = events[-1]["response"]
    assert (got["status"], got["error"]["code"]) == ("failed", code)
    assert got["error"]["message"] == "the worker is gone"


async def test_a_failure_before_the_first_event_has_its_status() -> None:
    service = model(HERMES, [RequestError(Fault.OVERLOADED, "full")])
    status, got = await posted(service, stream=True)
    assert (status, got["error"]["type"]) == (429, "rate_limit_error")
    async with sdk(service) as client:
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model="m/one", input="Hi")
