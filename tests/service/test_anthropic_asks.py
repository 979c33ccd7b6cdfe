"""What Anthropic's requests mean: messages, tools, parameters, and what is refused by name."""

import json
from typing import Any

import pytest

from router.api.rest.anthropic_asks import chat_ask, ignored, messages_of
from router.api.rest.body import check
from router.api.rest.models_anthropic import MessagesPrompt, MessagesRequest
from router.ask import ConstraintKind
from router.config import Settings
from router.conversation import ChatAsk, ToolMode
from router.errors import Fault, RequestError
from tests.service.chat_bench import CHATML, tokenizer
from tests.service.fake_service import FakeFleet
from tests.service.test_anthropic import TOOL, ask, thinker

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
SWITCHED = CHATML + "{% if enable_thinking %}<think>{% endif %}{{ reasoning_effort }}"
LOOK = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}


def request(**fields: object) -> MessagesRequest:
    given = {"model": "tgi", "max_tokens": 9, "messages": [user("Hi")], **fields}
    return check(given, MessagesRequest)


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def asked(template: str = CHATML, settings: Settings | None = None, **fields: object) -> ChatAsk:
    fleet = FakeFleet()
    fleet.tokenizer = tokenizer(template)
    return chat_ask(request(**fields), fleet, settings or Settings())  # type: ignore[arg-type]


def refused(**fields: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        asked(**fields)
    return caught.value


# Messages ----------------------------------------------------------------------------------------


def test_blocks_of_text_are_paragraphs_and_turns_of_one_role_are_one() -> None:
    body = request(
        system=[text("Be brief."), text("Be kind.")],
        messages=[
            user([text("One."), text("Two.")]),
            user("Three."),
            {"role": "system", "content": "Now in French."},
            assistant("Un."),
            assistant([text("Deux.")]),
            user("Encore."),
        ],
    )
    assert messages_of(body) == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "One.\n\nTwo.\n\nThree."},
        {"role": "system", "content": "Now in French."},
        {"role": "assistant", "content": "Un.\n\nDeux."},
        {"role": "user", "content": "Encore."},
    ]


def test_calls_and_results_are_messages_in_openais_shape() -> None:
    body = request(
        messages=[
            user("Paris or Rome?"),
            assistant(
                [
                    {"type": "thinking", "thinking": "I must look.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "secret"},
                    text("I look."),
                    LOOK,
                    {**LOOK, "id": "toolu_2", "input": {"city": "Rome"}},
                ]
            ),
            user(
                [
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_1",
                        "content": [text("Sun,"), text("no wind.")],
                    },
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_2",
                        "content": "no answer",
                        "is_error": True,
                    },
                    text("And now?"),
                ]
            ),
        ]
    )
    call = {"type": "function", "function": {"name": "get_weather"}}
    assert messages_of(body)[1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "I must look.",
            "tool_calls": [
                {
                    **call,
                    "id": f"toolu_{number}",
                    "function": {"name": "get_weather", "arguments": {"city": city}},
                }
                for number, city in ((1, "Paris"), (2, "Rome"))
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "Sun,\n\nno wind."},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no answer"},
        {"role": "user", "content": "And now?"},
    ]


def test_turns_that_are_one_lose_neither_thoughts_nor_calls() -> None:
    first = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, LOOK]
    second = [{"type": "thinking", "thinking": "Ah.", "signature": ""}, {**LOOK, "id": "toolu_2"}]
    body = request(messages=[user("x"), assistant(first), assistant(second), user("y")])
    merged = messages_of(body)[1]
    assert merged["content"] == ""
    assert merged["reasoning_content"] == "Hm.\n\nAh."
    assert [call["id"] for call in merged["tool_calls"]] == ["toolu_1", "toolu_2"]


def test_a_result_without_content_is_empty() -> None:
    body = request(
        messages=[
            user("x"),
            assistant([LOOK]),
            user([{"type": "tool_result", "tool_use_id": "toolu_1"}]),
        ]
    )
    assert messages_of(body)[2] == {"role": "tool", "tool_call_id": "toolu_1", "content": ""}


def test_a_begun_answer_is_continued() -> None:
    ask = asked(messages=[user("The capital of France?"), assistant("It is")])
    assert (ask.continuing, ask.opening) == (True, False)
    for plain in (asked(), asked(messages=[user("The capital of France?"), assistant(" ")])):
        assert (plain.continuing, plain.opening) == (False, True)


async def test_ids_of_calls_go_the_whole_way_round() -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    service = thinker(call)
    first = (await ask(service, tools=[TOOL])).json()
    (block,) = first["content"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "21"}
    turns = [user("Rome?"), assistant(first["content"]), user([result])]
    assert (await ask(service, tools=[TOOL], messages=turns)).status_code == 200
    prompt = service.asks[-1].prompt
    assert isinstance(prompt, str)
    assert '"arguments": {"city": "Rome"}' in prompt
    assert "<|im_start|>tool\n21" in prompt


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [user([text("x"), {"type": "text"}])]}, "messages.0.content.1.text"),
        ({"messages": [user([{"text": "x"}])]}, "messages.0.content.0.type"),
        ({"messages": [user("x"), assistant([LOOK])]}, "messages"),
        (
            {"messages": [assistant([{**LOOK, "input": "x"}]), user("y")]},
            "messages.0.content.0.input",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "now"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"output_format": FORMAT, "output_config": {"format": FORMAT}}, "output_format"),
    ],
)
def test_what_makes_no_sense_is_named(fields: dict[str, Any], field: str) -> None:
    error = refused(**fields)
    assert (error.fault, error.field) == (Fault.VALIDATION, field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        (
            {"messages": [user([{"type": "image", "source": {"type": "url", "url": "x"}}])]},
            "messages.0.content.0.type",
        ),
        ({"messages": [user([LOOK])]}, "messages.0.content.0.type"),
        ({"messages": [assistant([{"type": "tool_result"}])]}, "messages.0.content.0.type"),
        (
            {
                "messages": [
                    user(
                        [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "image"}],
                            }
                        ]
                    )
                ]
            },
            "messages.0.content.0.content.0.type",
        ),
        ({"system": [{"type": "document"}]}, "system.0.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
    ],
)
def test_what_is_not_there_is_refused_by_name(fields: dict[str, Any], field: str) -> None:
    error = refused(**fields)
    assert (error.fault, error.field) == (Fault.UNSUPPORTED, field)
    assert field in error.message


# Tools and parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "mode", "tool", "several"),
    [
        (None, ToolMode.AUTO, None, True),
        ({"type": "auto"}, ToolMode.AUTO, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolMode.AUTO, None, False),
        ({"type": "none"}, ToolMode.NONE, None, True),
        ({"type": "any"}, ToolMode.REQUIRED, None, True),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolMode.REQUIRED, None, False),
        ({"type": "tool", "name": "get_weather"}, ToolMode.REQUIRED, "get_weather", True),
    ],
)
def test_the_choice_of_tools(
    choice: object, mode: ToolMode, tool: str | None, several: bool
) -> None:
    ask = asked(tools=[TOOL], tool_choice=choice)
    assert (ask.mode, ask.tool, ask.parallel_calls) == (mode, tool, several)
    (known,) = ask.tools
    assert known.name == "get_weather"
    assert known.parameters == TOOL["input_schema"]
    assert known.entry == {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather",
            "parameters": TOOL["input_schema"],
        },
    }


def test_a_choice_without_tools_chooses_nothing() -> None:
    for kind in ("auto", "none"):
        assert asked(tool_choice={"type": kind}).mode is ToolMode.AUTO


def test_a_tool_without_a_schema_has_no_input() -> None:
    (tool,) = asked(tools=[{"name": "now", "type": "custom"}]).tools
    assert tool.parameters == {"type": "object", "properties": {}}
    assert "description" not in tool.entry["function"]


def test_parameters() -> None:
    ask = asked(temperature=0, top_p=0.5, top_k=3, stop_sequences=["a"], speed="fast")
    params = ask.params
    assert (params.temperature, params.top_p, params.top_k) == (0, 0.5, 3)
    assert (params.stop, params.max_tokens, ask.priority) == (("a",), 9, 0)
    assert asked(service_tier="standard_only").priority == 1
    # As small as can be: the likeliest token alone is left.
    assert 0 < asked(top_p=0).params.top_p < 1e-5


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"output_config": {"format": FORMAT}}, "output_config.format.schema"),
        ({"output_format": FORMAT}, "output_format.schema"),
    ],
)
def test_a_schema_for_the_answer(fields: dict[str, Any], field: str) -> None:
    constraint = asked(**fields).params.constraint
    assert constraint is not None
    assert (constraint.kind, constraint.field) == (ConstraintKind.JSON_SCHEMA, field)
    assert json.loads(constraint.text) == SCHEMA
    # A call that is forced leaves no text to be of any format.
    assert asked(tools=[TOOL], tool_choice={"type": "any"}, **fields).params.constraint is None


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {"enable_thinking": True}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    ],
)
def test_what_a_template_reads_of_thinking_it_is_told(
    fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    assert asked(SWITCHED, **fields).variables == variables
    assert asked(CHATML, **fields).variables == {}


async def test_what_has_no_effect_is_named() -> None:
    fields = {
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "output_config": {"effort": "low", "style": 1},
        "context_management": {},
        "metadata": {"user_id": "u"},
    }
    answer = await ask(thinker("x", template=CHATML), **fields)
    assert answer.headers["x-ignored-parameters"] == (
        "context_management,output_config.effort,output_config.style,thinking.budget_tokens"
    )
    told = asked(SWITCHED, **fields)
    assert ignored(request(**fields), told) == ["thinking.budget_tokens"]


def test_a_prompt_to_count_needs_no_limit() -> None:
    body = check({"model": "tgi", "messages": [user("Hi")]}, MessagesPrompt)
    assert chat_ask(body, FakeFleet(), Settings()).params.max_tokens is None  # type: ignore[arg-type]
