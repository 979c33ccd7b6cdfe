"""One tool call written as tags, as Qwen3-Coder and Qwen 3.5 do.

``<function=f><parameter=a>text</parameter>...</function>``: text stands as it is, everything else
as JSON. Which of the two a value is, the function's schema says; where it may be either, as for
`string | null`, what is JSON of another type is text. What is passed on is JSON.
"""

import json
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from router.text.tools.calls import EMPTY, STRING_CHARS_MAX, Step
from router.text.tools.scan import SPACE

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END, _OVER = "</parameter>", "</function>"
_TAG_CHARS_MAX = 256
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_DEPTH_MAX = 32
_KINDS: dict[type, str] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
ANY = frozenset(_KINDS.values())
"""All types of JSON."""
Schema = Mapping[str, Any]


class _At(Enum):
    HEAD = auto()
    BETWEEN = auto()
    VALUE = auto()


class TagCall:
    """Reads one call, ``<function=`` included. ``schemas`` are the functions' parameters."""

    __slots__ = (
        "_at",
        "_count",
        "_given",
        "_held",
        "_kinds",
        "_open",
        "_schemas",
        "_seen",
        "_text",
        "name",
        "tail",
        "taken",
        "whole",
    )

    def __init__(self, schemas: Mapping[str, Schema]) -> None:
        self._schemas = schemas
        self._at = _At.HEAD
        self._given = ""
        self._held = ""
        self._open: list[str] = []  # a value that is no text, so far
        self._text: Schema | None = None  # the schema of a value that is text
        self._kinds = ANY  # what a value that is no text may be
        self._seen: set[str] = set()
        self._count = 0
        self.name: str | None = None
        self.taken: list[str] = []
        self.whole = False
        self.tail = ""

    def feed(self, char: str) -> Step:
        """Takes the next character."""
        if self._at is _At.VALUE:
            return self._in_value(char)
        if not self._held and char in SPACE:
            return Step.MORE
        self._held += char
        if len(self._held) > _TAG_CHARS_MAX:
            return Step.FAILED
        return self._in_head() if self._at is _At.HEAD else self._between()

    def _in_head(self) -> Step:
        name = self._tag(_FUNCTION)
        if name is None:
            return Step.MORE if self._may_be(_FUNCTION) else Step.FAILED
        if name not in self._schemas:
            return Step.FAILED
        self._given, self._held, self._at = name, "", _At.BETWEEN
        return Step.MORE

    def _between(self) -> Step:
        if self._held == _OVER:
            self.name, self.whole = self._given, True
            self.taken.append("}" if self._seen else EMPTY)
            return Step.DONE
        key = self._tag(_PARAMETER)
        if key is None:
            known = self._may_be(_PARAMETER) or _OVER.startswith(self._held)
            return Step.MORE if known else Step.FAILED
        if not key or key in self._seen:
            return Step.FAILED
        self._begin(key)
        return Step.MORE

    def _tag(self, opening: str) -> str | None:
        """What a tag that has just ended names."""
        if not self._held.startswith(opening) or self._held[-1] != ">":
            return None
        return self._held[len(opening) : -1].strip()

    def _may_be(self, opening: str) -> bool:
        return opening.startswith(self._held) or self._held.startswith(opening)

    def _begin(self, key: str) -> None:
        self.name = self._given
        root = self._schemas[self._given]
        schema = (root.get("properties") or {}).get(key, {})
        self._text = schema if is_text(schema) else None
        self._kinds = kinds_of(schema, root)
        before = ", " if self._seen else "{"
        self._seen.add(key)
        self.taken.append(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        if self._text is not None:
            self.taken.append('"')
        self._held, self._open, self._count, self._at = "", [], 0, _At.VALUE

    def _in_value(self, char: str) -> Step:
        self._count += 1
        if self._count == 1 and char == "\n":  # it belongs to the tag
            return Step.MORE
        self._held += char
        if self._held.endswith(_END):
            self._end(self._held[: -len(_END)].removesuffix("\n"))
            return Step.MORE
        sure = len(self._held) - _possible(self._held)
        self._pass(self._held[:sure])
        self._held = self._held[sure:]
        return Step.MORE if self._count <= STRING_CHARS_MAX else Step.FAILED

    def _pass(self, text: str) -> None:
        if self._text is None:
            self._open.append(text)
        elif text:
            self.taken.append(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end(self, text: str) -> None:
        self._pass(text)
        value = '"' if self._text is not None else _value("".join(self._open), self._kinds)
        self.taken.append(value)
        self._held, self._at = "", _At.BETWEEN


def _possible(held: str) -> int:
    """How much of the end may become the closing tag, with the line break before it."""
    for size in range(min(len(held), len(_END)), 0, -1):
        if held.endswith((f"\n{_END}"[:size], _END[:size])):
            return size
    return 0


def _value(text: str, kinds: frozenset[str]) -> str:
    """JSON as it is, Python's words as JSON's, and everything else as a text.

    What would be JSON of another type than the schema wants is a text, if that may be.
    """
    text = text.strip()
    word = _PYTHON.get(text, text)
    try:
        kind = _KINDS[type(json.loads(word, parse_constant=_refused))]
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return word if kind in kinds or "string" not in kinds else json.dumps(text, ensure_ascii=False)


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def is_text(schema: Any) -> bool:
    """Whether a schema is of texts and nothing else."""
    if not isinstance(schema, Mapping):
        return False
    options = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if options is not None and not (isinstance(options, list) and options):
        return False
    if options is not None and "type" not in schema:
        return all(isinstance(option, str) for option in options)
    return bool(schema.get("type") == "string")


def kinds_of(schema: Any, root: Schema) -> frozenset[str]:
    """The types that a schema allows, integers as numbers; all of them where that is not seen.

    ``root`` has what a schema refers to.
    """
    return _kinds(schema, root, {}, _DEPTH_MAX)


def _kinds(
    schema: Any, root: Schema, known: dict[int, frozenset[str]], depth: int
) -> frozenset[str]:
    """As ``kinds_of``. Each part is looked at once, however often others refer to it."""
    if not isinstance(schema, Mapping) or depth == 0:
        return ANY
    if id(schema) in known:
        return known[id(schema)]
    known[id(schema)] = ANY  # for what refers to itself
    found = _own_kinds(schema)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            branches = (_kinds(one, root, known, depth - 1) for one in schema[word])
            found &= frozenset[str]().union(*branches)
    whole = schema.get("allOf")
    for one in [*(whole if isinstance(whole, list) else ()), _referred(schema, root)]:
        found &= _kinds(one, root, known, depth - 1)
    known[id(schema)] = found
    return found


def _own_kinds(schema: Schema) -> frozenset[str]:
    """The types that a schema names itself, and those of the values that it lists."""
    found, given = ANY, schema.get("type")
    if given is not None:
        names = given if isinstance(given, list) else [given]
        found &= {"number" if name == "integer" else str(name) for name in names}
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(options, list):
        found &= {_KINDS.get(type(option), "") for option in options}
    return found


def _referred(schema: Schema, root: Schema) -> Any:
    """What a schema refers to within its root; None if it does not, or to something else."""
    at: Any = root
    path = schema.get("$ref")
    if not isinstance(path, str) or not path.startswith("#/"):
        return None
    for part in path[2:].split("/"):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at


def written(function: Mapping[str, Any]) -> str:
    """A call as tags."""
    lines = [f"{_FUNCTION}{function['name']}>"]
    for key, value in function["arguments"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += [f"{_PARAMETER}{key}>", text, _END]
    return "\n".join([*lines, _OVER])
