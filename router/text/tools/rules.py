"""The rules of one tool's arguments, as JSON or as tags, in llguidance's Lark."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from router.conversation import Tool
from router.errors import Fault, RequestError
from router.text import constraints
from router.text.tools.tag_calls import is_text

_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON on one line as templates show it; free white space lets small models run on for ever."""
_NO_MEMBERS = frozenset({"type", "properties", "required", "title", "description", "$schema"})
_WITH_TAGS = _NO_MEMBERS | {"additionalProperties", "$defs", "definitions", "$id", "$comment"}
_AS_TAGS = frozenset(
    {"type", "enum", "const", "minLength", "maxLength", "title", "description", "default"}
    | {"examples", "$comment"}
)


def schema_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments as it is compiled."""
    # Clients in Go write null for a list or an object that is empty.
    schema = {name: value for name, value in parameters.items() if value is not None}
    if schema.keys() <= _NO_MEMBERS and not schema.get("properties"):
        # "An object", and nothing of what is in it: a function without parameters.
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    schema.setdefault("type", "object")
    return dict(constraints.as_meant(schema))


def schema_rule(parameters: Mapping[str, Any]) -> str:
    """What matches the JSON of a schema."""
    schema = schema_of(parameters)
    schema.setdefault("x-guidance", _LAYOUT)
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def tag_rules(tool: Tool, number: int) -> Iterator[str]:
    """The rule ``call<number>`` of a call as tags, and those that it needs.

    Raises RequestError, UNSUPPORTED, for what tags cannot be made to keep.
    """
    schema = tool.parameters
    _check(tool, schema, _WITH_TAGS)
    needed = schema.get("required") or ()
    parts = [literal(f"<function={tool.name}>\n")]
    for place, (key, value) in enumerate((schema.get("properties") or {}).items()):
        name = f"value{number}_{place}"
        tag = literal(f"<parameter={key}>\n")
        part = f"{tag} {name}"
        parts.append(part if key in needed else f"({part})?")
        yield from _value_rules(tool, name, value, schema)
    yield f"call{number}: " + " ".join([*parts, literal("</function>")])


def _value_rules(tool: Tool, name: str, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """The rule of a value with its closing tag."""
    end = literal("\n</parameter>\n")
    if not is_text(schema):
        within = dict(schema) if isinstance(schema, Mapping) else {}
        within |= {key: root[key] for key in ("$defs", "definitions") if key in root}
        rule = {"x-guidance": _LAYOUT, **within} if schema is not False else {"not": {}}
        yield f"{name}: {name}_json {end}"
        yield f"{name}_json: %json {json.dumps(rule, ensure_ascii=False)}"
        return
    _check(tool, schema, _AS_TAGS)
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    if options is not None:
        texts = " | ".join(literal(option) for option in options if isinstance(option, str))
        yield f"{name}: ({texts}) {end}"
        return
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    yield f"{name}[suffix={end}]: /(?s:.{{{least},{most}}})/"


def _check(tool: Tool, schema: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(schema.keys() - known)
    if unknown:
        raise RequestError(
            Fault.UNSUPPORTED,
            f"this model writes arguments as tags, by which `{unknown[0]}` in the parameters of"
            f" {tool.name} cannot be forced: leave it out, or set tool_choice to auto",
            "tools",
        )


def literal(text: str) -> str:
    """A string as Lark has them, which is as JSON has them."""
    return json.dumps(text, ensure_ascii=False)
