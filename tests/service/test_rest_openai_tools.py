"""Tools over OpenAI's chat route, read by OpenAI's own client."""

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage

from router.conversation import ToolMode
from router.core.events import Reason
from tests.service.chat_bench import HERMES, MAY_THINK, TemplateService, said, tokenizer
from tests.service.fake_service import FakeFleet, FakeService, Step, events_of, words
from tests.service.rest_server import USER, chat, serving

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "description": "The time.", "strict": True}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def model(template: str, *scripts: list[Step]) -> TemplateService:
    service = TemplateService(*scripts)
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(template)
    return service


def pieces(text: str) -> list[Step]:
    """An answer that comes three characters at a time."""
    return said(*(text[at : at + 3] for at in range(0, len(text), 3)))


async def test_calls_are_answered_as_openai_does() -> None:
    answer = await chat(model(HERMES, pieces(CALL + SECOND)), tools=TOOLS)
    (choice,) = answer.json()["choices"]
    calls = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in calls}) == 2
    assert [(call["type"], call["function"]["name"]) for call in calls] == [
        ("function", "weather"),
        ("function", "now"),
    ]
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Köln"}


async def test_text_before_calls_and_thoughts_stay_apart() -> None:
    answer = await chat(
        model(MAY_THINK, pieces("<think>\nHm.\n</think>\n\nOne moment." + CALL)), tools=TOOLS
    )
    message = answer.json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"]) == ("Hm.", "Hm.")
    assert message["content"].strip() == "One moment."
    assert len(message["tool_calls"]) == 1
    whole = await chat(model(MAY_THINK, pieces("<think>Hm.</think>Yes.")), separate_reasoning=False)
    message = whole.json()["choices"][0]["message"]
    assert message["content"] == "<think>Hm.</think>Yes."
    assert "reasoning_content" not in message


async def test_streamed_calls_have_their_head_once() -> None:
    answer = await chat(model(HERMES, pieces(CALL + SECOND)), tools=TOOLS, stream=True)
    *events, done = events_of(answer.text)
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert choices[-1]["finish_reason"] == "tool_calls"
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    heads = [delta for delta in deltas if "id" in delta]
    assert [(head["index"], head["type"], head["function"]["name"]) for head in heads] == [
        (0, "function", "weather"),
        (1, "function", "now"),
    ]
    assert all("name" not in d["function"] and "type" not in d for d in deltas if "id" not in d)
    joined = "".join(d["function"]["arguments"] for d in deltas if d["index"] == 0)
    assert json.loads(joined) == {"city": "Köln"}
    assert len([d for d in deltas if d["index"] == 0]) > 2  # they come as they are written


async def test_streamed_thoughts_have_both_names() -> None:
    service = model(MAY_THINK, said("<think>", "a", "b", "</think>", "c", ""))
    answer = await chat(service, stream=True, stream_options={"include_usage": True})
    *events, usage, _ = events_of(answer.text)
    assert set(usage["usage"]["completion_tokens_details"]) == {"reasoning_tokens"}
    deltas = [event["choices"][0]["delta"] for event in events]
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert thoughts == "".join(delta.get("reasoning", "") for delta in deltas) == "ab"
    assert "".join(delta.get("content") or "" for delta in deltas) == "c"


async def test_several_answers_have_their_own_calls() -> None:
    service = model(HERMES, pieces(CALL), pieces("No."), pieces(SECOND))
    choices = (await chat(service, tools=TOOLS, n=3)).json()["choices"]
    assert sorted(choice["finish_reason"] for choice in choices) == [
        "stop", "tool_calls", "tool_calls",
    ]  # fmt: skip
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", ())]
    assert len(set(ids)) == 2


async def test_a_call_that_was_cut_short_ends_by_length() -> None:
    cut = said("<tool_call>\n", '{"name": "weather", "arguments": {"city"', reason=Reason.LENGTH)
    answer = await chat(model(HERMES, cut), tools=TOOLS)
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_older_clients_speak_of_functions() -> None:
    functions = [tool["function"] for tool in TOOLS]
    service = model(HERMES, pieces(CALL))
    answer = await chat(service, functions=functions, function_call="auto")
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "function_call"
    call = choice["message"]["function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Köln"})
    assert "tool_calls" not in choice["message"]
    streamed = await chat(service, functions=functions, stream=True)
    choices = [event["choices"][0] for event in events_of(streamed.text)[:-1]]
    parts = [choice["delta"].get("function_call", {}) for choice in choices]
    assert [part["name"] for part in parts if "name" in part] == ["weather"]
    assert json.loads("".join(part.get("arguments", "") for part in parts)) == {"city": "Köln"}
    assert choices[-1]["finish_reason"] == "function_call"


ALL, FORCED = {"weather", "now"}, ToolMode.REQUIRED
CHOICES: list[tuple[Any, ToolMode, str | None, set[str]]] = [
    (None, ToolMode.AUTO, None, ALL),
    ("auto", ToolMode.AUTO, None, ALL),
    ("none", ToolMode.NONE, None, ALL),
    ("required", FORCED, None, ALL),
    ({"type": "function", "function": {"name": "now"}}, FORCED, "now", ALL),
    ({"type": "function", "name": "now"}, FORCED, "now", ALL),
    ("now", FORCED, "now", ALL),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [WEATHER]}},
        ToolMode.AUTO,
        None,
        {"weather"},
    ),
    (
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER, NOW]}},
        FORCED,
        None,
        ALL,
    ),
]


@pytest.mark.parametrize(("choice", "mode", "name", "offered"), CHOICES)
async def test_every_tool_choice_is_understood(
    choice: Any, mode: ToolMode, name: str | None, offered: set[str]
) -> None:
    forced = mode is ToolMode.REQUIRED
    service = model(HERMES, pieces(SECOND if forced else "Hi."))
    answer = await chat(service, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    assert answer.status_code == 200, answer.text
    (ask,) = service.asks
    constraint = ask.params.constraint
    assert (constraint is not None) == forced
    if constraint is not None:
        assert constraint.field == "tool_choice"
        expected = {name} if name else offered
        assert {tool for tool in ALL if f'\\"{tool}\\"' in constraint.text} == expected
    shown = {tool for tool in ALL if f'"name": "{tool}"' in str(ask.prompt)}
    assert shown == (set() if mode is ToolMode.NONE else offered)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        (
            {"tools": [{"type": "function", "function": {"name": "no spaces"}}]},
            "tools.0.function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools.0.function.parameters",
        ),
        ({"tools": TOOLS, "functions": [NOW["function"]]}, "functions"),
        ({"functions": [NOW["function"]], "function_call": {"name": "f"}}, "function_call"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp", "name": "now"}}, "tool_choice"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"tools": [{"type": "mcp", "name": "now"}]},
                },
            },
            "tool_choice.allowed_tools",
        ),
        ({"function_call": {"name": "now"}}, "function_call"),
        ({"tools": TOOLS, "function_call": {"name": "now"}}, "function_call"),
        ({"tools": TOOLS, "function_call": "none"}, "function_call"),
        ({"functions": [NOW["function"]], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [NOW["function"]], "tool_choice": "none"}, "tool_choice"),
    ],
)
async def test_bad_tools_are_named(fields: dict[str, object], param: str) -> None:
    answer = await chat(FakeService(), **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"function_call": "none"},
        {"function_call": "auto"},
        {"tools": TOOLS, "function_call": "auto"},
        {"functions": [NOW["function"]], "tool_choice": "auto"},
    ],
)
async def test_a_choice_of_the_other_form_may_ask_for_nothing(fields: dict[str, object]) -> None:
    answer = await chat(model(HERMES, pieces("Hi.")), **fields)
    assert answer.status_code == 200, answer.text


async def test_schemas_reach_the_template_whole_whatever_they_are_called() -> None:
    functions = [
        {"name": "a", "arguments": SCHEMA},  # TGI's word for parameters
        {"name": "b", "description": None},
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    service = model(HERMES, said("Hi."))
    await chat(service, tools=tools, tool_prompt="Be quick.")
    prompt = str(service.asks[0].prompt)
    empty = {"type": "object", "properties": {}}
    for function in ({"name": "a", "parameters": SCHEMA}, {"name": "b", "parameters": empty}):
        assert json.dumps({"type": "function", "function": function}) in prompt
    assert "Hi\n---\nBe quick.<|im_end|>" in prompt


async def test_a_conversation_with_calls_goes_round_through_the_openai_client() -> None:
    service = model(HERMES, pieces(CALL), pieces("Sunny."))
    async with (
        serving(service) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        messages: list[Any] = [*USER]
        async with client.chat.completions.stream(
            model="tgi",
            messages=messages,
            tools=TOOLS,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        ) as stream:
            events = [event.type async for event in stream]
            first = await stream.get_final_completion()
        assert "tool_calls.function.arguments.done" in events
        message: ChatCompletionMessage = first.choices[0].message
        assert first.choices[0].finish_reason == "tool_calls"
        assert first.usage is not None
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        messages += [
            message,
            {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "clear"}'},
        ]
        second = await client.chat.completions.create(
            model="tgi",
            messages=messages,
            tools=TOOLS,  # type: ignore[arg-type]
        )
        assert second.choices[0].message.content == "Sunny."
        prompt = str(service.asks[1].prompt)
        # The template has got an object, and writes it down as the model did.
        assert '{"name": "weather", "arguments": {"city": "Köln"}}' in prompt
        assert '{"sky": "clear"}' in prompt


async def test_messages_reach_the_chat_in_one_shape() -> None:
    service = FakeService(words())
    call = {"name": "now", "arguments": "{}"}
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "x"}], "more": 1},
        {"role": "assistant", "content": None, "function_call": call, "reasoning": "Hm."},
        {"role": "function", "name": "now", "content": "12:00"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "y"},
    ]
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(HERMES)
    answer = await chat(service, messages=messages)
    assert answer.status_code == 200, answer.text
    system, user, called, told, refused, again, last = service.messages
    assert (system["role"], system["content"]) == ("system", "S")
    assert (user["name"], user["more"], user["content"][0]["text"]) == ("Ann", 1, "x")
    assert called["tool_calls"] == [
        {"type": "function", "function": {"name": "now", "arguments": {}}}
    ]
    assert called["reasoning_content"] == "Hm."
    assert (told["role"], told["name"]) == ("tool", "now")
    assert refused["content"] == "No."
    assert again["content"] == [{"type": "text", "text": "No."}]
    assert last == messages[-1]
