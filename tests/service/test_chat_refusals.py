"""Chats that are refused, and the field that is named."""

import json
from dataclasses import replace
from typing import Any

import pytest

from router.ask import Params
from router.conversation import ChatAsk, Tool, ToolMode
from router.errors import Fault, RequestError
from router.text import constraints
from tests.service.chat_bench import HERMES, MISTRAL, TOOLS, USER, answer, chats, said, tool

SCHEMA = constraints.json_schema({"type": "object"}, "response_format")
DEEP: Any = {}
for _ in range(100):
    DEEP = {"a": DEEP}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": ()}, "messages"),
    ({"messages": ({"content": "a"},)}, "messages.0.role"),
    ({"messages": ({"role": "user", "content": 1},)}, "messages.0.content"),
    ({"messages": (*USER, {"role": "user", "content": ["a"]})}, "messages.1.content.0"),
    ({"messages": ({"role": "user", "content": [{"type": "image_url"}]},)}, "messages.0.content.0"),
    ({"messages": ({"role": "user", "content": [{"type": "text"}]},)},
     "messages.0.content.0.text"),
    ({"messages": ({"role": "user", "content": "a", "x": DEEP},)}, "messages.0"),
    ({"messages": ({"role": "assistant", "tool_calls": 3},)}, "messages.0.tool_calls"),
    ({"messages": ({"role": "assistant", "tool_calls": [{}]},)},
     "messages.0.tool_calls.0.function"),
    ({"messages": ({"role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},)},
     "messages.0.tool_calls.0.function.arguments"),
    ({"messages": ({"role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]},)},
     "messages.0.tool_calls.0.function.arguments"),
    ({"variables": {"messages": []}}, "chat_template_kwargs"),
    ({"variables": {"a": DEEP}}, "chat_template_kwargs"),
    ({"mode": ToolMode.REQUIRED}, "tool_choice"),
    ({"tools": TOOLS, "mode": ToolMode.REQUIRED, "tool": "other"}, "tool_choice"),
    ({"tools": TOOLS, "mode": ToolMode.REQUIRED, "params": Params(constraint=SCHEMA)},
     "response_format"),
    ({"tools": (tool("f"), tool("f"))}, "tools.1.function.name"),
    ({"tools": (tool(""),)}, "tools.0.function.name"),
    ({"tools": (tool("a b"),)}, "tools.0.function.name"),
    ({"tools": (tool("f"), tool("g", {"type": "string"}))}, "tools.1.function.parameters"),
    ({"tools": (tool("f", {"properties": []}),)}, "tools.0.function.parameters.properties"),
    ({"tools": (tool("f", {"required": {"a": True}}),)}, "tools.0.function.parameters.required"),
    ({"tools": (tool("f", DEEP),)}, "tools.0.function.parameters"),
    ({"tools": (Tool("f", {}, {"function": DEEP}),)}, "tools.0"),
    ({"tools": tuple(tool(f"f{number}") for number in range(257))}, "tools"),
    ({"messages": (*USER, {"role": "assistant", "content": ""}), "continuing": True},
     "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), REFUSED)
async def test_what_is_refused_and_where_it_is_at_fault(change: dict[str, Any], field: str) -> None:
    chat, service = chats(HERMES, said("a"))
    with pytest.raises(RequestError) as caught:
        await chat.chat(replace(ChatAsk(USER), **change))
    assert caught.value.field == field
    assert caught.value.wire.http in (413, 422)
    assert service.asks == []


async def test_the_templates_own_objection_is_passed_on() -> None:
    chat, _ = chats(MISTRAL, said("a"))
    with pytest.raises(RequestError) as caught:
        await chat.chat(ChatAsk(({"role": "critic", "content": "a"},)))
    assert caught.value.fault is Fault.TEMPLATE
    assert caught.value.message == "Only user, assistant and tool roles"


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        (
            {"mode": ToolMode.REQUIRED},
            ["tools.0.function.parameters", "tools.1.function.parameters"],
        ),
        ({"mode": ToolMode.REQUIRED, "tool": "now"}, ["tools.1.function.parameters"]),
        (
            {"params": Params(constraint=SCHEMA)},
            ["response_format", "tools.0.function.parameters", "tools.1.function.parameters"],
        ),
        ({"params": Params(constraint=SCHEMA), "mode": ToolMode.NONE}, []),
    ],
)
async def test_a_grammar_says_what_it_was_made_of(more: dict[str, Any], fields: list[str]) -> None:
    chat, service = chats(HERMES, said("a"))
    await answer(chat, ChatAsk(USER, tools=TOOLS, **more))
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert [part.field for part in constraint.parts] == fields
    for part in constraint.parts[-len(TOOLS) :]:
        assert json.loads(part.text)["type"] == "object"
