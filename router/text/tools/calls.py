"""One tool call, read while it is being written.

A call is sure to be one when it names a function that was offered and its arguments have begun as
an object: from there on they are passed on as they come. Before that nothing is, so that whatever
turns out to be no call can still be text.
"""

import json
import re
from collections.abc import Set as AbstractSet
from enum import Enum, auto
from typing import Protocol

from router.text.tools.scan import SPACE, ObjectScanner

_NAMES = ("name", "function")
_ARGUMENTS = ("arguments", "parameters")
_ASIDES = ("type", "id")
_KEYS = (*_NAMES, *_ARGUMENTS, *_ASIDES)
_KEY_CHARS_MAX = 16
_NAME_CHAR = re.compile(r"[\w.-]")
_NULL = "null"
EMPTY = "{}"
STRING_CHARS_MAX = 1 << 20
"""Characters of arguments within a string, which have to be held until it ends."""


class Step(Enum):
    """What came of a character."""

    MORE = auto()
    DONE = auto()
    DONE_BEFORE = auto()  # the call was whole already, and its ``tail`` is no part of it
    FAILED = auto()


class CallReader(Protocol):
    """Reads one call. ``name`` is set when the call is sure to be one.

    ``taken`` are the arguments that have come since they were taken away. ``whole`` says that
    name and arguments are complete, whether or not something may follow; ``tail`` is what did.
    """

    name: str | None
    taken: list[str]
    whole: bool
    tail: str

    def feed(self, char: str) -> Step:
        """Takes the next character."""


class _At(Enum):
    MEMBER = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    STRING = auto()
    NULL = auto()
    OBJECT = auto()
    NEXT = auto()
    REST = auto()


class ObjectCall:
    """``{"name": "f", "arguments": {...}}`` behind its opening brace, members in any order.

    Also understood: ``parameters`` for ``arguments``, arguments as JSON within a string, null, an
    empty string or none at all, ``type`` and ``id`` beside them, and OpenAI's
    ``{"type": "function", "function": {...}}``. Behind name and arguments whatever members, with
    whatever values, which are passed over.
    """

    __slots__ = (
        "_at",
        "_depth",
        "_escaped",
        "_given",
        "_key",
        "_names",
        "_rest",
        "_scanner",
        "_string",
        "name",
        "tail",
        "taken",
        "whole",
    )

    def __init__(self, names: AbstractSet[str]) -> None:
        self._names = names
        self._at = _At.MEMBER
        self._depth = 1
        self._key = ""
        self._string: list[str] = []
        self._escaped = False
        self._given: str | None = None
        self._scanner: ObjectScanner | None = None
        self._rest: ObjectScanner | None = None
        self.name: str | None = None
        self.taken: list[str] = []
        self.whole = False
        self.tail = ""

    def feed(self, char: str) -> Step:
        """Takes the next character."""
        whole = self.whole
        step = self._step(char)
        if whole:
            self.tail += char
            if step is Step.FAILED:
                # Small models forget the last brace; nothing of the call is missing without it.
                return Step.DONE_BEFORE
        return step

    def _step(self, char: str) -> Step:
        match self._at:
            case _At.KEY:
                return self._in_key(char)
            case _At.STRING:
                return self._in_string(char)
            case _At.NULL:
                return self._in_null(char)
            case _At.OBJECT:
                return self._in_object(char)
            case _At.REST:
                return self._in_rest(char)
            case _:
                return Step.MORE if char in SPACE else self._between(char)

    def _between(self, char: str) -> Step:
        match self._at:
            case _At.MEMBER:
                self._at, self._key = _At.KEY, ""
                return Step.MORE if char == '"' else Step.FAILED
            case _At.COLON:
                self._at = _At.VALUE
                return Step.MORE if char == ":" else Step.FAILED
            case _At.VALUE:
                return self._value(char)
            case _:
                return self._behind(char)

    def _in_key(self, char: str) -> Step:
        if char == '"' and self._key in _KEYS:
            self._at = _At.COLON
            return Step.MORE
        if self.whole and not any(key.startswith(self._key + char) for key in _KEYS):
            return self._pass_over('"' + self._key, char)
        self._key += char
        return Step.MORE if char != '"' and len(self._key) <= _KEY_CHARS_MAX else Step.FAILED

    def _value(self, char: str) -> Step:
        if char == '"':
            self._at, self._string = _At.STRING, [char]
        elif char == _NULL[0] and self._key in _ARGUMENTS and self._scanner is None:
            self._at, self._string = _At.NULL, [char]
        elif char == "{" and self._key == "function" and self._depth == 1:
            self._at, self._depth = _At.MEMBER, 2
        elif char == "{" and self._key in _ARGUMENTS and self._scanner is None:
            self._at, self._scanner = _At.OBJECT, ObjectScanner()
            self._settle()
            return self._in_object(char)
        elif self.whole and self._key in _ASIDES:
            return self._pass_over(f'"{self._key}":', char)
        else:
            return Step.FAILED
        return Step.MORE

    def _pass_over(self, before: str, char: str) -> Step:
        """What is left of the object, from a member on that has begun so, is of no interest."""
        self._at, self._rest = _At.REST, ObjectScanner()
        for one in "{" + before:
            self._rest.feed(one)
        return self._in_rest(char)

    def _in_rest(self, char: str) -> Step:
        assert self._rest is not None
        if self._rest.feed(char) is None:
            return Step.FAILED
        if not self._rest.done:
            return Step.MORE if len(self.tail) < STRING_CHARS_MAX else Step.FAILED
        self._at = _At.NEXT
        return self._behind(char)

    def _in_string(self, char: str) -> Step:
        self._string.append(char)
        if len(self._string) > STRING_CHARS_MAX:
            return Step.FAILED
        if self._escaped or char != '"':
            self._escaped = char == "\\" and not self._escaped
            return Step.MORE
        self._at = _At.NEXT
        try:
            text = json.loads("".join(self._string), strict=False)
        except ValueError:
            return Step.FAILED
        if self._key in _NAMES:
            return self._named(text)
        return self._quoted(text) if self._key in _ARGUMENTS else Step.MORE

    def _named(self, text: str) -> Step:
        if self._given is not None or text not in self._names:
            return Step.FAILED
        self._given = text
        if self._scanner is not None:
            self._settle()
        return Step.MORE

    def _in_null(self, char: str) -> Step:
        """Arguments that are none. What else begins so is found out by what follows."""
        self._string.append(char)
        text = "".join(self._string)
        if text == _NULL:
            self._at = _At.NEXT
        return Step.MORE if _NULL.startswith(text) else Step.FAILED

    def _quoted(self, text: str) -> Step:
        """Arguments as a string that holds JSON; an empty one has none."""
        if not text.strip(SPACE) and self._scanner is None:
            return Step.MORE
        scanner = ObjectScanner()
        outs = [None if scanner.done else scanner.feed(char) for char in text]
        if self._scanner is not None or not scanner.done or None in outs:
            return Step.FAILED
        self.taken += [out for out in outs if out is not None]
        self._scanner = scanner
        self._settle()
        return Step.MORE

    def _in_object(self, char: str) -> Step:
        assert self._scanner is not None
        out = self._scanner.feed(char)
        if out is None:
            return Step.FAILED
        self.taken.append(out)
        if self._scanner.done:
            self._at = _At.NEXT
            self._settle()
        return Step.MORE

    def _settle(self) -> None:
        """A call with a known name and arguments that have begun is one."""
        self.name = self._given
        self.whole = self.name is not None and self._scanner is not None and self._scanner.done

    def _behind(self, char: str) -> Step:
        if char == ",":
            self._at = _At.MEMBER
            return Step.MORE
        if char == "}":
            self._depth -= 1
            return Step.MORE if self._depth else self._end()
        return Step.FAILED

    def _end(self) -> Step:
        if self._given is None:
            return Step.FAILED
        if self._scanner is None:
            self.name, self.whole = self._given, True
            self.taken.append(EMPTY)
        return Step.DONE


class NamedCall:
    """``name[ARGS]{...}``, as Mistral's models write it, perhaps with ``[CALL_ID]id`` between."""

    __slots__ = (
        "_given",
        "_names",
        "_scanner",
        "_tag",
        "_tagged",
        "name",
        "tail",
        "taken",
        "whole",
    )

    def __init__(self, names: AbstractSet[str]) -> None:
        self._names = names
        self._given = ""
        self._tag: str | None = None
        self._tagged = ""
        self._scanner: ObjectScanner | None = None
        self.name: str | None = None
        self.taken: list[str] = []
        self.whole = False
        self.tail = ""

    def feed(self, char: str) -> Step:
        """Takes the next character."""
        if self._scanner is not None:
            return self._in_object(char)
        if self._tag is not None:
            return self._in_tag(char)
        if char == "{" and self._given in self._names:
            self.name, self._scanner = self._given, ObjectScanner()
            return self._in_object(char)
        if char == "[" and self._given in self._names:
            self._tag = ""
        elif char in SPACE or self._tagged:
            pass
        elif _NAME_CHAR.match(char):
            self._given += char
        else:
            return Step.FAILED
        return Step.MORE

    def _in_tag(self, char: str) -> Step:
        assert self._tag is not None
        if char != "]":
            self._tag += char
            return (
                Step.MORE
                if "CALL_ID".startswith(self._tag) or "ARGS".startswith(self._tag)
                else Step.FAILED
            )
        # Behind [CALL_ID] comes the model's own id, which is passed over: ours are unique.
        self._tagged = "" if self._tag == "ARGS" else self._tag
        known, self._tag = self._tag in ("CALL_ID", "ARGS"), None
        return Step.MORE if known else Step.FAILED

    def _in_object(self, char: str) -> Step:
        assert self._scanner is not None
        out = self._scanner.feed(char)
        if out is None:
            return Step.FAILED
        self.taken.append(out)
        self.whole = self._scanner.done
        return Step.DONE if self.whole else Step.MORE
