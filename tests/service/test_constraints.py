"""Constraints as protocols ask for them; what needs no compiler to be refused."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ask import Constraint, ConstraintKind
from router.errors import Fault, RequestError
from router.text import constraints


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def refused(call: Any, *arguments: object) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments, "response_format")
    assert caught.value.fault is Fault.VALIDATION
    assert caught.value.field == "response_format"
    assert "`response_format`" in caught.value.message
    return caught.value.message


def test_any_object() -> None:
    made = constraints.json_object("grammar")
    assert made.kind is ConstraintKind.JSON_SCHEMA
    assert json.loads(made.text) == {"type": "object"}
    assert made.field == "grammar"


def test_a_schema_is_written_out() -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    made = constraints.json_schema(schema, "guided_json")
    assert (made.kind, made.field) == (ConstraintKind.JSON_SCHEMA, "guided_json")
    assert json.loads(made.text) == schema
    assert constraints.json_schema(True, "x").text == "true"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ({"uniqueItems": False}, {}),
        ({"uniqueItems": True}, {"uniqueItems": True}),
        ({"uniqueItems": 0}, {"uniqueItems": 0}),
        ({"not": False}, {}),
        ({"not": {}}, {"not": {}}),
        ({"propertyNames": {}, "dependentRequired": {}, "unevaluatedItems": True}, {}),
        ({"unevaluatedProperties": False}, {"unevaluatedProperties": False}),
        ({"format": "password"}, {}),
        ({"format": "email"}, {"format": "email"}),
        ({"if": {"type": "null"}, "minContains": 1}, {}),
        ({"then": {}, "else": {}, "maxContains": 2}, {}),
        ({"if": True, "then": {}}, {"if": True, "then": {}}),
        ({"contains": True, "minContains": 2}, {"contains": True, "minContains": 2}),
    ],
)
def test_words_that_ask_for_nothing_are_left_out(words: Any, kept: Any) -> None:
    """Wherever a schema is: properties may have these names, and keep them."""
    schema = {"properties": {"format": {"type": "array", **words}}, "anyOf": [words], **words}
    meant = {"properties": {"format": {"type": "array", **kept}}, "anyOf": [kept], **kept}
    assert json.loads(constraints.json_schema(schema, "x").text) == meant


@pytest.mark.parametrize(
    ("schema", "meant"),
    [
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object"}),
        (
            {"properties": {"properties": {"properties": {"type": {}}}}},
            {
                "properties": {"properties": {"properties": {"type": {}}, "type": "object"}},
                "type": "object",
            },
        ),
        (
            {"type": "array", "items": {"properties": {}}, "$defs": {"d": {"properties": {}}}},
            {
                "type": "array",
                "items": {"properties": {}, "type": "object"},
                "$defs": {"d": {"properties": {}, "type": "object"}},
            },
        ),
        (
            {"anyOf": [{"properties": {}}, {"type": "null"}, {"enum": [{"properties": {}}]}]},
            {
                "anyOf": [
                    {"properties": {}, "type": "object"},
                    {"type": "null"},
                    {"enum": [{"properties": {}}]},
                ]
            },
        ),
        # Those that say themselves what they are.
        *(
            (one, one)
            for one in (
                {"type": ["object", "null"], "properties": {}},
                {"anyOf": [{"type": "null"}], "properties": {}},
                {"$ref": "#/$defs/a", "properties": {}},
                {"const": {"properties": {}}, "properties": {}},
                {"default": {"properties": {}}, "required": ["a"]},
            )
        ),
    ],
)
def test_properties_without_a_type_are_those_of_an_object(schema: Any, meant: Any) -> None:
    given = json.dumps(schema)
    assert json.loads(constraints.json_schema(schema, "x").text) == meant
    assert json.dumps(schema) == given


def test_the_order_of_properties_is_kept() -> None:
    made = constraints.json_schema({"properties": {"b": {}, "a": {}}}, "x")
    assert list(json.loads(made.text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ([], "an object or a boolean"),
        ("{}", "an object or a boolean"),
        (None, "an object or a boolean"),
        ({"enum": [1 << 70]}, "not a JSON schema"),
        ({"const": "\ud800"}, "not a JSON schema"),
        (nested(constraints.NESTING_MAX + 1), "levels deep"),
        (nested(100_000), "levels deep"),
        ({"const": "x" * constraints.TEXT_BYTES_MAX}, "bytes"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, says: str) -> None:
    assert says in refused(constraints.json_schema, schema)


def test_a_schema_of_the_deepest_nesting_is_taken() -> None:
    schema = nested(constraints.NESTING_MAX)
    assert json.loads(constraints.json_schema(schema, "x").text) == schema


def test_a_regex_is_kept_as_it_is() -> None:
    assert constraints.regex(r"^\d+$", "regex") == Constraint(
        ConstraintKind.REGEX, r"^\d+$", "regex"
    )


@pytest.mark.parametrize("call", [constraints.regex, constraints.grammar])
@pytest.mark.parametrize(
    ("text", "says"),
    [("", "not empty"), ("\udc00", "surrogate"), ("é" * constraints.TEXT_BYTES_MAX, "bytes")],
)
def test_texts_have_bounds(call: Any, text: str, says: str) -> None:
    assert says in refused(call, text)


def test_choices_are_one_terminal_without_doubles() -> None:
    made = constraints.choice(["a", 'say "no"\n', "a"], "guided_choice")
    assert made.kind is ConstraintKind.LARK
    assert made.text == 'start: CHOICE\nCHOICE: "a" | "say \\"no\\"\\n"\n'


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "1 to"),
        (["a"] * (constraints.OPTIONS_MAX + 1), "1 to"),
        (["a", ""], "not empty"),
        (["a", 1], "list of texts"),
        (["\ud800"], "surrogate"),
        (["x" * constraints.TEXT_BYTES_MAX], "bytes"),
    ],
)
def test_what_is_no_choice_is_refused(options: Any, says: str) -> None:
    assert says in refused(constraints.choice, options)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_choices_are_escaped(options: list[str]) -> None:
    try:
        text = constraints.choice(options, "x").text
    except RequestError:
        return
    decoder, found, rest = json.JSONDecoder(), [], text.removeprefix("start: CHOICE\nCHOICE: ")
    while rest.strip():
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].removeprefix(" | ")
    assert found == list(dict.fromkeys(options))
