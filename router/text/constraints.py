"""Constraints on an answer, from what protocols call a response format, a guided choice, a grammar.

Pure functions, one for each way of asking. What they refuse needs no compiler to see: wrong types,
and texts that are too large. Whether llguidance can compile what they return, the workers say; see
``docs/structured-output.md`` for the dialects.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from router.ask import Constraint, ConstraintKind
from router.errors import Fault, RequestError

TEXT_BYTES_MAX = 256 * 1024
"""Bytes of UTF-8 that a constraint can have: it travels with every admission. ``shards/grammar.py``
has the same bound."""
NESTING_MAX = 96
"""Objects and lists inside each other in a JSON schema: the compiler's JSON reader ends at 128."""
OPTIONS_MAX = 4096

_KINDS = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"})
"""Words by which a schema says what its values are."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties")
_SEVERAL = ("anyOf", "oneOf", "allOf", "prefixItems")
_ASK_NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "propertyNames": (True, {}),
    "unevaluatedProperties": (True, {}),
    "unevaluatedItems": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "format": ("password", "binary", "path"),
}
"""Words that the compiler refuses, and the values with which they bar no text. Formats are those
that tell a form how to show a field."""
_COMPANIONS = {
    "if": ("then", "else"),
    "then": ("if",),
    "else": ("if",),
    "minContains": ("contains",),
    "maxContains": ("contains",),
}
"""Words that mean nothing without one of others."""


def json_object(field: str) -> Constraint:
    """Any JSON object."""
    return Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', field)


def json_schema(schema: Mapping[str, Any] | bool, field: str) -> Constraint:
    """JSON that is valid by a schema, read as ``as_meant`` does. Raises RequestError."""
    if not isinstance(schema, Mapping | bool):
        raise _invalid(f"`{field}` must be a JSON schema: an object or a boolean", field)
    _check_nesting(schema, field)
    try:
        text = orjson.dumps(as_meant(schema)).decode()
    except TypeError as error:
        raise _invalid(f"`{field}` is not a JSON schema: {error}", field) from error
    return _bounded(ConstraintKind.JSON_SCHEMA, text, field)


def as_meant(schema: Any) -> Any:
    """The schema with the type that goes without saying, without words that ask for nothing.

    What has properties is an object. By the letter a text would be valid, too, and a small model
    likes to write one. TGI's examples leave the type out, and it makes objects of them. Nothing is
    changed in place.
    """
    if not isinstance(schema, Mapping):
        return schema
    made = {word: value for word, value in schema.items() if not _asks_nothing(word, value, schema)}
    for word in _NAMED:
        if isinstance(made.get(word), Mapping):
            made[word] = {name: as_meant(one) for name, one in made[word].items()}
    for word in _ONE:
        if word in made:
            made[word] = as_meant(made[word])
    for word in _SEVERAL:
        if isinstance(made.get(word), list):
            made[word] = [as_meant(one) for one in made[word]]
    if "properties" in made and not made.keys() & _KINDS:
        made["type"] = "object"
    return made


def _asks_nothing(word: str, value: Any, schema: Mapping[str, Any]) -> bool:
    if word in _COMPANIONS:
        return not schema.keys() & set(_COMPANIONS[word])
    # By type as well: 0 is no False, and a wrong value is for the compiler to name.
    return any(type(value) is type(one) and value == one for one in _ASK_NOTHING.get(word, ()))


def regex(pattern: str, field: str) -> Constraint:
    """A text that a regular expression matches as a whole. Raises RequestError, VALIDATION."""
    return _bounded(ConstraintKind.REGEX, pattern, field)


def choice(options: Sequence[str], field: str) -> Constraint:
    """One of several texts. Raises RequestError, VALIDATION."""
    if not 0 < len(options) <= OPTIONS_MAX:
        raise _invalid(
            f"`{field}` must have 1 to {OPTIONS_MAX} choices. Given: {len(options)}", field
        )
    if not all(isinstance(option, str) and option for option in options):
        raise _invalid(f"`{field}` must be a list of texts that are not empty", field)
    # One terminal, not one for each choice: the lexer then runs one automaton for all of them.
    texts = " | ".join(map(_literal, dict.fromkeys(options)))
    return _bounded(ConstraintKind.LARK, f"start: CHOICE\nCHOICE: {texts}\n", field)


def grammar(text: str, field: str) -> Constraint:
    """A grammar in Lark with the rule ``start``, or in llama.cpp's GBNF with the rule ``root``.

    The workers tell the two apart. Raises RequestError, VALIDATION.
    """
    return _bounded(ConstraintKind.LARK, text, field)


def _literal(text: str) -> str:
    """A string as Lark has them, which is as JSON has them."""
    return json.dumps(text, ensure_ascii=False)


def _bounded(kind: ConstraintKind, text: str, field: str) -> Constraint:
    if not isinstance(text, str) or not text:
        raise _invalid(f"`{field}` must be a text that is not empty", field)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _invalid(f"`{field}` holds half of a surrogate pair, which is no text", field) from (
            error
        )
    if size > TEXT_BYTES_MAX:
        raise _invalid(
            f"`{field}` may have up to {TEXT_BYTES_MAX} bytes once it is written out."
            f" Given: {size}",
            field,
        )
    return Constraint(kind, text, field)


def _check_nesting(schema: object, field: str) -> None:
    """Refuses what is nested too deeply, level by level, so that nothing here recurses."""
    level = [schema]
    for _ in range(NESTING_MAX):
        below: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        level = [value for value in below if isinstance(value, Mapping | list | tuple)]
        if not level:
            return
    raise _invalid(f"`{field}` is nested more than {NESTING_MAX} levels deep", field)


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
