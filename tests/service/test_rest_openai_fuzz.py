"""Bodies that no client would send: each is answered, and none with a 5xx."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.api.rest.models_chat import ChatRequest
from router.api.rest.models_completions import CompletionRequest
from tests.service.chat_bench import HERMES, TemplateService, tokenizer
from tests.service.fake_service import FakeFleet, FakeService
from tests.service.rest_server import chat, complete

texts = st.sampled_from(
    ["", "x", "auto", "required", "f", "text", "json_object", "\U0001f642\u0301"]
)
numbers = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
names = st.sampled_from(
    "type name function parameters schema json_schema value content role text tool_calls id "
    "arguments mode tools allowed_tools json regex choice include_usage".split()
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4)
)


def bodies(model: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of a body's fields with whatever value, often one that is nearly right."""
    fields = [field for field in model.model_fields if field not in ("prompt", "messages")]
    return st.dictionaries(st.sampled_from(fields), values, max_size=5)


ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "x"])
messages = st.lists(
    st.builds(lambda role, more: {"role": role, **more}, ROLES, st.dictionaries(names, values)),
    max_size=3,
)
FUZZED = settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def templated() -> FakeService:
    service = TemplateService()
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(HERMES)
    return service


@FUZZED
@given(fields=bodies(ChatRequest), conversation=st.none() | messages)
async def test_strange_chats_are_answered(fields: dict[str, Any], conversation: Any) -> None:
    more = {} if conversation is None else {"messages": conversation}
    answer = await chat(templated(), **fields, **more)
    assert answer.status_code in (200, 400, 404), answer.text


@FUZZED
@given(fields=bodies(CompletionRequest), prompt=st.just("x") | values)
async def test_strange_completions_are_answered(fields: dict[str, Any], prompt: Any) -> None:
    answer = await complete(templated(), **{**fields, "prompt": prompt})
    assert answer.status_code in (200, 400, 404), answer.text


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"type": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("depth", [90, 200, 900])
async def test_deep_values_are_answered(depth: int, kind: type) -> None:
    deep = nested(depth, kind)
    function = {"name": "f", "parameters": {"type": "object", "properties": deep}}
    for fields in (
        {"tools": [{"type": "function", "function": function}]},
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"tool_choice": deep, "tools": []},
        {"response_format": {"type": "json_object", "schema": {"a": deep}}},
        {"response_format": {"type": "json", "value": deep}},
        {"guided_json": {"a": deep}},
        {"structured_outputs": deep},
        {"chat_template_kwargs": {"a": deep}},
        {"documents": [{"a": deep}]},
        {"metadata": deep},
        {"messages": [{"role": "user", "content": "x", "more": deep}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": deep}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "a": deep}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": deep}}}],
                }
            ]
        },
    ):
        answer = await chat(templated(), **fields)
        assert answer.status_code in (200, 400), (fields.keys(), answer.text)
