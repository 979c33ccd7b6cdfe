"""What an answer must be: the ways in which OpenAI's, TGI's and vLLM's clients ask for it."""

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from router.api.rest.models_openai import ResponseFormat, SamplingFields, StructuredOutputs
from router.ask import Constraint
from router.errors import Fault, RequestError
from router.text import constraints

GUIDED: dict[str, Callable[[Any, str], Constraint]] = {
    "guided_regex": constraints.regex,
    "guided_choice": constraints.choice,
    "guided_grammar": constraints.grammar,
}


def constraint_of(body: SamplingFields) -> Constraint | None:
    """Returns the one constraint that a body asks for, if any.

    Raises RequestError, VALIDATION, for more than one and for what can be seen to be none.
    """
    asked = list(_asked(body))
    if len(asked) > 1:
        first, second = asked[0].field, asked[1].field
        text = f"`{first}` and `{second}` exclude each other: leave one of them out"
        raise RequestError(Fault.VALIDATION, text, second)
    return asked[0] if asked else None


def _asked(body: SamplingFields) -> Iterator[Constraint]:
    if body.response_format is not None:
        yield from _response_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _structured(body.structured_outputs)
    if body.guided_json is not None:
        yield _schema(body.guided_json, "guided_json")
    for field, make in GUIDED.items():
        if (value := getattr(body, field)) is not None:
            yield make(value, field)


def _response_format(asked: ResponseFormat) -> Iterator[Constraint]:
    """OpenAI's formats, and TGI's, which have a ``value``."""
    field = "response_format"
    match asked.type:
        case "text":
            return
        case "regex":
            yield constraints.regex(_needed(asked.value, "value", asked), field)
        case "grammar":
            yield constraints.grammar(_needed(asked.grammar, "grammar", asked), field)
        case "json":
            yield _schema(_needed(asked.value, "value", asked), field)
        case "json_object":
            schema = asked.definition if asked.value is None else asked.value
            yield constraints.json_object(field) if schema is None else _schema(schema, field)
        case "json_schema":
            yield _named_schema(asked, field)


def _named_schema(asked: ResponseFormat, field: str) -> Constraint:
    """OpenAI's `json_schema`. TGI has the same object under `value`."""
    if asked.json_schema is None:
        value = _needed(asked.value, "json_schema", asked)
        named = isinstance(value, dict) and isinstance(value.get("schema"), dict | bool)
        return _schema(value["schema"] if named else value, field)
    schema = asked.json_schema.definition
    return constraints.json_object(field) if schema is None else _schema(schema, field)


def _needed(value: Any, name: str, asked: ResponseFormat) -> Any:
    if value is None:
        field = f"response_format.{name}"
        text = f"`{field}` is needed with the type {asked.type!r}"
        raise RequestError(Fault.VALIDATION, text, field)
    return value


def _structured(asked: StructuredOutputs) -> Iterator[Constraint]:
    field = "structured_outputs"
    if asked.schema_or_text is not None:
        yield _schema(asked.schema_or_text, f"{field}.json")
    if asked.regex is not None:
        yield constraints.regex(asked.regex, f"{field}.regex")
    if asked.choice is not None:
        yield constraints.choice(asked.choice, f"{field}.choice")
    if asked.grammar is not None:
        yield constraints.grammar(asked.grammar, f"{field}.grammar")
    if asked.json_object:
        yield constraints.json_object(f"{field}.json_object")


def _schema(value: Any, field: str) -> Constraint:
    """A JSON schema, which some clients send as text."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            text = f"`{field}` is not valid JSON: {error}"
            raise RequestError(Fault.VALIDATION, text, field) from None
    return constraints.json_schema(value, field)
