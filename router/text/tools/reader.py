"""Splits a stream of text into plain text and tool calls, whatever pieces the stream comes in.

Text goes through at once, but for what may be the start of a marker, and white space, which belongs
to the calls if they follow. Calls are read as ``calls.py`` says; what begins like a call and is
none is text again and is read again, so nothing is lost. A call whose arguments turn out not to be
JSON in their midst ends there: what follows is text, and ``broken`` says so.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

from router.conversation import Call, CallDelta
from router.text.tools.calls import CallReader, NamedCall, ObjectCall, Step
from router.text.tools.formats import ToolFormat
from router.text.tools.scan import SPACE
from router.text.tools.tag_calls import TagCall

_SPACE_HELD_MAX = 64
_FENCES = ("```json", "```")
"""What models like to put around bare JSON; it is theirs no more than white space."""


@dataclass(slots=True)
class Said:
    """What a piece of the stream brought."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class _At(Enum):
    TEXT = auto()
    OPEN = auto()  # where a call must begin
    CALL = auto()
    NEXT = auto()  # within a list, behind a call


class ToolReader:
    """Reads one answer of a model that was offered functions, given as name and schema.

    ``hidden`` are the markers that are special tokens, which no client gets to see. ``limit`` is
    how many calls are passed on; further ones are read and left out. ``forced`` says that there is
    nothing but calls: the beginning of one that was cut short is no text then. ``broken`` says that
    one that was passed on is incomplete.
    """

    def __init__(
        self,
        form: ToolFormat,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        hidden: AbstractSet[str] = frozenset(),
        limit: int | None = None,
        forced: bool = False,
    ) -> None:
        self._form = form
        self._schemas = schemas
        self._hidden = hidden
        self._limit = limit
        self._forced = forced
        self._closers = tuple(filter(None, (form.closer, *(";,]" if form.bare else ""))))
        self._drops = tuple(hidden - {form.opener, form.closer})
        marks = (form.opener, form.closer, *self._drops, *("{[`" if form.bare else ""))
        self._firsts = frozenset(mark[0] for mark in marks if mark)
        self._at = _At.TEXT
        self._held = ""  # TEXT: white space, and what may be a marker
        self._behind_call = False
        self._spoken = False  # whether there is any text yet
        self._line_start = True
        self._lead = self._marker = ""  # else: what led here,
        self._raw: list[str] = []  # and what came since
        self._in_list = self._fenced = False
        self._body: CallReader | None = None
        self._begun = self._muted = False
        self._text: list[str] = []
        self._deltas: list[CallDelta] = []
        self._pieces: list[str] = []
        self._heads: list[tuple[str, str]] = []  # of each call, its id and name
        self._arguments: list[list[str]] = []
        self.broken = False

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls passed on so far."""
        pairs = zip(self._heads, self._arguments, strict=True)
        return tuple(Call(head[0], head[1], "".join(pieces)) for head, pieces in pairs)

    def push(self, text: str) -> Said:
        """Takes the next piece of the stream."""
        if self._at is _At.TEXT and not self._held and not self._behind_call:
            text = self._plain(text)
        at = 0
        while at < len(text):
            again = self._step(text[at])
            at += 1
            if again:
                text, at = again + text[at:], 0
        return self._taken()

    def end(self) -> Said:
        """What was held back: no more text will come."""
        if self._body is not None and self._body.whole:
            self._complete()
        elif self._begun:
            self.broken = self.broken or not self._muted
            self._leave()
        elif not self._forced:
            self._text.append(self._unread())
        self._held, self._raw = "", []
        self._body, self._at = None, _At.TEXT
        return self._taken()

    def _unread(self) -> str:
        """What would have been a call or a marker, had it gone on."""
        if self._at is _At.TEXT:
            return "" if self._is_layout(self._held) else self._held
        if self._at is _At.NEXT or self._is_full:
            return ""
        return self._lead + self._shown(self._marker) + "".join(self._raw)

    @property
    def _is_full(self) -> bool:
        return self._limit is not None and len(self._heads) >= self._limit

    def _plain(self, text: str) -> str:
        """Lets text without any marker pass; returns what has to be looked at."""
        plain = text.rstrip(SPACE)
        if not self._firsts.isdisjoint(text) or len(text) - len(plain) > _SPACE_HELD_MAX:
            return text
        if plain:
            self._text.append(plain)
            self._spoken, self._line_start = True, False
        self._held = text[len(plain) :]
        return ""

    def _taken(self) -> Said:
        self._flush_pieces()
        said = Said("".join(self._text), self._deltas)
        self._text, self._deltas = [], []
        return said

    def _step(self, char: str) -> str:
        """Takes a character, returns what has to be read anew."""
        match self._at:
            case _At.TEXT:
                return self._in_text(char)
            case _At.OPEN:
                return self._in_open(char)
            case _At.CALL:
                return self._in_call(char)
            case _At.NEXT:
                return self._in_next(char)

    def _in_text(self, char: str) -> str:
        self._held += char
        while self._held:
            word = self._held.lstrip(SPACE)
            space = self._held[: len(self._held) - len(word)]
            again = self._marked(space, word) if word else self._spaced(space)
            if again is not None:
                return again
            layout = self._behind_call and not self._spoken
            self._say(("" if layout else space) + word[0])
            self._held = word[1:]
        return ""

    def _spaced(self, space: str) -> str:
        if len(space) > _SPACE_HELD_MAX:
            self._say(space)
        return ""

    def _marked(self, space: str, word: str) -> str | None:
        """Takes what is a marker or may become one; None if it is none.

        Returns what has to be read anew, as in ``_step``.
        """
        closing = self._behind_call and (word in self._closers or self._ends_fence(word))
        start = None if closing else self._bare_start(space, word)
        if word == self._form.opener:
            self._open(space, word)
        elif start in ("{", "["):
            self._open(self._held[:-1], "")
            return start
        elif closing or word in self._drops:
            self._held = "" if self._behind_call else space
        elif start != "" and not self._may_grow(word):
            return None
        return ""

    def _ends_fence(self, word: str) -> bool:
        if not self._fenced or word != _FENCES[-1]:
            return False
        self._fenced = False
        return True

    def _bare_start(self, space: str, word: str) -> str | None:
        """What there is of a call without a marker; None if the line does not begin like one."""
        if not self._form.bare or not (self._line_start or "\n" in space):
            return None
        for fence in _FENCES:
            rest = word.removeprefix(fence)
            if rest != word and (not rest or rest[0] in SPACE):
                held = len(rest) - len(rest.lstrip(SPACE)) <= _SPACE_HELD_MAX
                return rest.lstrip(SPACE) if held else None
        return "" if _FENCES[0].startswith(word) else word

    def _may_grow(self, word: str) -> bool:
        behind = (*self._closers, *(_FENCES if self._fenced else ()))
        marks = (self._form.opener, *self._drops, *(behind if self._behind_call else ()))
        return any(mark.startswith(word) for mark in marks)

    def _is_layout(self, held: str) -> bool:
        """Whether what is left at the end belongs to the calls: space, the part of a marker."""
        word = held.strip(SPACE)
        marks = (self._form.opener, *self._closers, *(_FENCES if self._fenced else ()))
        return self._behind_call and (not word or any(mark.startswith(word) for mark in marks))

    def _say(self, text: str) -> None:
        self._text.append(text)
        self._spoken = True
        self._held = ""
        self._behind_call = False
        self._line_start = text.endswith("\n")

    def _shown(self, marker: str) -> str:
        return "" if marker in self._hidden else marker

    def _open(self, space: str, marker: str) -> None:
        self._lead = "" if self._behind_call else space
        self._marker, self._raw, self._held = marker, [], ""
        self._in_list = False
        self._fenced = "`" in space
        self._at = _At.OPEN

    def _in_open(self, char: str) -> str:
        if char == "[" and not self._in_list and not "".join(self._raw).strip(SPACE):
            self._in_list = True
        elif self._form.tags and char == "<":
            self._body = TagCall(self._schemas)
            self._at = _At.CALL
            return char
        elif char == "{" and not self._form.tags:
            self._body = ObjectCall(self._schemas.keys())
            self._at = _At.CALL
        elif self._form.opener == "[TOOL_CALLS]" and not self._in_list and char not in SPACE:
            self._body = NamedCall(self._schemas.keys())
            self._at = _At.CALL
            return char
        elif char not in SPACE:
            return self._fail(char)
        self._raw.append(char)
        return ""

    def _in_call(self, char: str) -> str:
        assert self._body is not None
        step = self._body.feed(char)
        if step is Step.FAILED:
            return self._fail(char)
        if not self._begun:
            self._raw.append(char)
        self._pass_on(self._body)
        if step is Step.MORE:
            return ""
        tail = self._body.tail if step is Step.DONE_BEFORE else ""
        self._complete()
        return tail

    def _in_next(self, char: str) -> str:
        if char == ",":
            self._lead, self._marker, self._raw = "", "", [char]
            self._at = _At.OPEN
        elif char not in SPACE:
            self._at = _At.TEXT
            return "" if char == "]" else char
        return ""

    def _pass_on(self, body: CallReader) -> None:
        """Hands out what is sure of the call in hand."""
        if body.name is None:
            return
        if not self._begun:
            self._begin(body.name)
        self._pieces += body.taken
        body.taken.clear()

    def _begin(self, name: str) -> None:
        self._flush_pieces()
        self._begun = True
        self._muted = self._is_full
        if not self._muted:
            new = self._form.new_id()
            self._deltas.append(CallDelta(len(self._heads), new, name, ""))
            self._heads.append((new, name))
            self._arguments.append([])

    def _flush_pieces(self) -> None:
        text, self._pieces = "".join(self._pieces), []
        if not text or self._muted:
            return
        index = len(self._heads) - 1
        self._arguments[index].append(text)
        last = self._deltas[-1] if self._deltas else None
        if last is not None and last.index == index:
            self._deltas[-1] = replace(last, arguments=last.arguments + text)
        else:
            self._deltas.append(CallDelta(index, None, None, text))

    def _leave(self) -> None:
        """Ends the call in hand."""
        self._flush_pieces()
        self._begun = self._muted = False
        self._body = None

    def _complete(self) -> None:
        assert self._body is not None
        self._pass_on(self._body)
        self._leave()
        self._lead = self._marker = self._held = ""
        self._raw = []
        self._at = _At.NEXT if self._in_list else _At.TEXT
        self._behind_call = self._line_start = True

    def _fail(self, char: str) -> str:
        """Makes text of what began like a call; returns what has to be read again."""
        begun, self._at = self._begun, _At.TEXT
        if begun:
            self.broken = self.broken or not self._muted
            self._leave()
            self._spoken, self._behind_call, self._line_start = True, False, False
            return char
        self._body, self._fenced = None, False
        again = "".join(self._raw) + char
        first = "" if self._marker else again[0]
        self._say(self._lead + self._shown(self._marker) + first)
        return again[len(first) :]
