"""JSON, followed character by character while it is being written."""

import json
import re
from enum import Enum, auto

DEPTH_MAX = 128
"""Objects and lists inside each other; what is deeper breaks the JSON readers of clients."""
SPACE = " \t\n\r"
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_SCALAR_CHARS = frozenset("-+.0123456789eEtrufalsn")
_HEX = frozenset("0123456789abcdefABCDEF")


class _At(Enum):
    """What may come next."""

    VALUE = auto()
    FIRST_ITEM = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    NEXT = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    SCALAR = auto()


class ObjectScanner:
    """Follows one JSON object from its opening brace to its closing one.

    ``done`` says that the object is complete; nothing more may be fed then.
    """

    __slots__ = ("_at", "_digits", "_is_key", "_open", "_scalar", "done")

    def __init__(self) -> None:
        self._at = _At.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._digits = 0
        self._scalar = ""
        self.done = False

    def feed(self, char: str) -> str | None:
        """Takes the next character, returns how strict JSON writes it; None if it cannot stand.

        The two differ for line breaks and other control characters in strings, which models write
        as they are and which JSON wants escaped, and for halves of surrogate pairs.
        """
        match self._at:
            case _At.STRING:
                return self._in_string(char)
            case _At.ESCAPE:
                return self._escaped(char)
            case _At.HEX:
                return self._digit(char)
            case _At.SCALAR:
                return self._in_scalar(char)
            case _:
                return char if char in SPACE or self._outside(char) else None

    def _in_string(self, char: str) -> str:
        if char == '"':
            self._at = _At.COLON if self._is_key else _At.NEXT
        elif char == "\\":
            self._at = _At.ESCAPE
        elif char < " " or "\ud800" <= char <= "\udfff":
            return json.dumps(char)[1:-1]
        return char

    def _escaped(self, char: str) -> str | None:
        if char == "u":
            self._at, self._digits = _At.HEX, 4
            return char
        self._at = _At.STRING
        return char if char in '"\\/bfnrt' else None

    def _digit(self, char: str) -> str | None:
        self._digits -= 1
        if not self._digits:
            self._at = _At.STRING
        return char if char in _HEX else None

    def _in_scalar(self, char: str) -> str | None:
        if char in _SCALAR_CHARS:
            self._scalar += char
            return char
        if _SCALAR.fullmatch(self._scalar) is None:
            return None
        self._at = _At.NEXT
        return self.feed(char)

    def _outside(self, char: str) -> bool:
        """Whether a character between values fits; moves on if it does."""
        match self._at:
            case _At.FIRST_KEY | _At.KEY:
                if char == "}":
                    return self._at is _At.FIRST_KEY and self._close("{")
                return char == '"' and self._string(is_key=True)
            case _At.COLON:
                self._at = _At.VALUE
                return char == ":"
            case _At.NEXT:
                return self._behind(char)
            case _:
                return self._value(char)

    def _behind(self, char: str) -> bool:
        if char == ",":
            self._at = _At.KEY if self._open[-1] == "{" else _At.VALUE
            return True
        return char in "}]" and self._close("{" if char == "}" else "[")

    def _value(self, char: str) -> bool:
        if char == "]":
            return self._at is _At.FIRST_ITEM and self._close("[")
        if not self._open and char != "{":
            return False
        if char in "{[":
            self._open.append(char)
            self._at = _At.FIRST_KEY if char == "{" else _At.FIRST_ITEM
            return len(self._open) <= DEPTH_MAX
        if char == '"':
            return self._string(is_key=False)
        self._at, self._scalar = _At.SCALAR, char
        return char in "-0123456789tfn"

    def _string(self, *, is_key: bool) -> bool:
        self._at, self._is_key = _At.STRING, is_key
        return True

    def _close(self, bracket: str) -> bool:
        if self._open.pop() != bracket:
            return False
        self._at, self.done = _At.NEXT, not self._open
        return True
