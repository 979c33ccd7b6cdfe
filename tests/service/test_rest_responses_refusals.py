"""What OpenAI's responses refuse, and by which name."""

from typing import Any

import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from router.api.rest.models_responses import ResponsesRequest
from tests.service.chat_bench import HERMES, said
from tests.service.test_rest_responses import WEATHER, model, posted, sdk

CALLED = {"type": "function_call", "call_id": "a", "name": "f"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"moderation": {}}, "moderation"),
    ({"include": ["secrets"]}, "include"),
    ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"stream_options": {}}, "stream_options"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"temperature": "hot"}, "temperature"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [WEATHER, {"type": "mcp", "server_label": "a"}]}, "tools.1.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
    ({"tools": [{**WEATHER, "parameters": {"type": "string"}}]}, "tools.0.parameters"),
    ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0.type"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "input.0.type"),
    ({"input": [{}]}, "input.0.type"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": 3}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
     "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
     "input.0.content.0.text"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input.0.arguments"),
    ({"input": [{**CALLED, "arguments": "{"}]}, "input.0.arguments"),
    ({"input": [{**CALLED, "arguments": "[1]"}]}, "input.0.arguments"),
    ({"input": [{**CALLED, "arguments": "[" * 9999}]}, "input.0.arguments"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input.0.output"),
]  # fmt: skip


@pytest.mark.parametrize("thoughts", [None, 5, "a", {}, [5], [{"text": 5}]])
async def test_thoughts_that_are_none_are_left_out(thoughts: Any) -> None:
    item = {"type": "reasoning", "summary": [], "content": thoughts}
    status, _ = await posted(
        model(HERMES, said("a")), input=[item, {"role": "user", "content": "b"}]
    )
    assert status == 200


@pytest.mark.parametrize(("change", "field"), REFUSED)
async def test_what_is_refused_is_named(change: dict[str, Any], field: str) -> None:
    service = model(HERMES, said("a"))
    status, got = await posted(service, **change)
    assert status == 400, got
    assert got["error"]["param"] == field
    assert got["error"]["type"] == "invalid_request_error"
    assert service.asks == []


async def test_openais_client_raises_its_own_error() -> None:
    async with sdk(model(HERMES, said("a"))) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="m/one", input="a", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="other", input="a")


async def test_what_asks_for_nothing_is_accepted() -> None:
    service = model(HERMES, said("a"))
    status, got = await posted(
        service,
        store=False,
        background=False,
        previous_response_id=None,
        conversation=None,
        include=["reasoning.encrypted_content", "file_search_call.results"],
        reasoning={"summary": "auto", "effort": None},
        text={"verbosity": "medium", "format": {"type": "text"}},
        prompt_cache_key="k",
        max_tool_calls=3,
        tool_choice="auto",
        unheard_of=1,
    )
    assert status == 200, got
    assert got["prompt_cache_key"] == "k"
    assert got["max_tool_calls"] == 3


def test_every_field_of_openais_is_known() -> None:
    known = set(ResponsesRequest.model_fields)
    assert set(ResponseCreateParamsStreaming.__annotations__) <= known


@pytest.mark.parametrize(
    ("choice", "forced", "shown"),
    [
        (None, None, True),
        ("auto", None, True),
        ("none", None, False),
        ("required", "get_weather", True),
        ({"type": "function", "name": "get_weather"}, "get_weather", True),
        ({"type": "allowed_tools", "mode": "required",
          "tools": [{"type": "function", "name": "get_weather"}]}, "get_weather", True),
    ],
)  # fmt: skip
async def test_the_choice_among_tools(choice: Any, forced: str | None, shown: bool) -> None:
    service = model(HERMES, said("a"))
    tools = [WEATHER, {"type": "function", "name": "now"}]
    status, got = await posted(service, tools=tools, tool_choice=choice)
    assert status == 200
    assert got["tool_choice"] == (choice or "auto")
    (ask,) = service.asks
    assert ("get_weather" in str(ask.prompt)) == shown
    constraint = ask.params.constraint
    if forced is None:
        assert constraint is None
    else:
        assert constraint is not None
        assert forced in constraint.text
        assert ("now" in constraint.text) == (choice == "required")
