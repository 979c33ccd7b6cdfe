"""What an answer must be, in all the ways in which clients ask for it."""

import json
from typing import Any

import pytest

from router.ask import Constraint, ConstraintKind
from tests.service.chat_bench import HERMES, TemplateService, said, tokenizer
from tests.service.fake_service import FakeFleet, FakeService
from tests.service.rest_server import chat, complete

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON, REGEX, LARK = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.LARK
OBJECT = {"type": "object"}
NAMED = {"name": "n", "schema": SCHEMA, "strict": True, "description": "d"}

FORMATS: list[tuple[dict[str, Any], ConstraintKind, Any]] = [
    ({"type": "json_object"}, JSON, OBJECT),
    ({"type": "json_schema", "json_schema": NAMED}, JSON, SCHEMA),
    ({"type": "json_schema", "json_schema": {"name": "n"}}, JSON, OBJECT),
    # text-generation-inference, and what others have made of json_object.
    ({"type": "json_object", "value": SCHEMA}, JSON, SCHEMA),
    ({"type": "json_object", "schema": SCHEMA}, JSON, SCHEMA),
    ({"type": "json", "value": SCHEMA}, JSON, SCHEMA),
    ({"type": "json", "value": json.dumps(SCHEMA)}, JSON, SCHEMA),
    ({"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}, JSON, SCHEMA),
    ({"type": "regex", "value": "[ab]+"}, REGEX, "[ab]+"),
    ({"type": "grammar", "grammar": 'start: "a"'}, LARK, 'start: "a"'),
]
GUIDED: list[tuple[dict[str, Any], str, ConstraintKind, Any]] = [
    ({"guided_json": SCHEMA}, "guided_json", JSON, SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, "guided_json", JSON, SCHEMA),
    ({"guided_regex": "a+"}, "guided_regex", REGEX, "a+"),
    ({"guided_grammar": 'start: "a"'}, "guided_grammar", LARK, 'start: "a"'),
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", JSON, SCHEMA),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs.regex", REGEX, "a+"),
    (
        {"structured_outputs": {"grammar": 'root ::= "a"'}},
        "structured_outputs.grammar",
        LARK,
        'root ::= "a"',
    ),
    (
        {"structured_outputs": {"json_object": True}},
        "structured_outputs.json_object",
        JSON,
        OBJECT,
    ),
]


def check(constraint: Constraint | None, kind: ConstraintKind, meaning: Any) -> None:
    assert constraint is not None
    assert constraint.kind is kind
    text = json.loads(constraint.text) if kind is JSON else constraint.text
    assert text == meaning


@pytest.mark.parametrize(("asked", "kind", "meaning"), FORMATS)
async def test_response_formats(asked: dict[str, Any], kind: ConstraintKind, meaning: Any) -> None:
    for send in (chat, complete):
        service = FakeService()
        answer = await send(service, response_format=asked)
        assert answer.status_code == 200, answer.text
        constraint = service.asks[0].params.constraint
        check(constraint, kind, meaning)
        assert constraint is not None
        assert constraint.field == "response_format"
        assert "x-ignored-parameters" not in answer.headers


@pytest.mark.parametrize(("fields", "field", "kind", "meaning"), GUIDED)
async def test_guided_fields(
    fields: dict[str, Any], field: str, kind: ConstraintKind, meaning: Any
) -> None:
    for send in (chat, complete):
        service = FakeService()
        assert (await send(service, **fields)).status_code == 200
        constraint = service.asks[0].params.constraint
        check(constraint, kind, meaning)
        assert constraint is not None
        assert constraint.field == field


async def test_choices_are_a_grammar() -> None:
    for fields in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["no"]}}):
        service = FakeService()
        assert (await chat(service, **fields)).status_code == 200
        constraint = service.asks[0].params.constraint
        assert constraint is not None
        assert constraint.kind is LARK
        assert '"no"' in constraint.text


async def test_text_is_no_constraint() -> None:
    service = FakeService()
    answer = await chat(
        service, response_format={"type": "text"}, structured_outputs={}, guided_json=None
    )
    assert answer.status_code == 200
    assert service.asks[0].params.constraint is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "regex"}}, "response_format.value"),
        ({"response_format": {"type": "regex", "value": 5}}, "response_format"),
        ({"response_format": {"type": "json", "value": 5}}, "response_format"),
        ({"response_format": {"type": "json", "value": "{"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [5]}, "guided_choice.0"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        (
            {"structured_outputs": {"regex": "a", "json_object": True}},
            "structured_outputs.json_object",
        ),
        (
            {"structured_outputs": {"structural_tag": {"type": "x"}}},
            "structured_outputs.structural_tag",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_formats_are_named(fields: dict[str, Any], param: str, stream: bool) -> None:
    for send in (chat, complete):
        service = FakeService()
        answer = await send(service, stream=stream, **fields)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert service.asks == []


async def test_a_forced_call_leaves_no_text_to_be_of_a_format() -> None:
    service = TemplateService(said('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'))
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(HERMES)
    answer = await chat(
        service,
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="required",
        response_format={"type": "json_object"},
    )
    assert answer.status_code == 200, answer.text
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert constraint.field == "tool_choice"
