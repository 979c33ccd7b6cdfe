"""Answers in Anthropic's shapes: blocks as they come, whole messages, and the events of streams.

An answer is a list of blocks, made one after the other: thoughts, text, calls of tools. Whole
answers and streams are made of the same changes, so both have the same blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson

from router.api.rest.sse import PING
from router.conversation import CallDelta, ChatChunk, ChatFinish
from router.core.events import Reason

Json = dict[str, Any]

THINKING = {"type": "thinking", "thinking": "", "signature": ""}
"""How thoughts begin. Nobody here signs them, and nobody asks for a signature."""
STOP_REASON = {
    Reason.EOS: "end_turn",
    Reason.STOP_TOKEN: "end_turn",
    Reason.LENGTH: "max_tokens",
    Reason.STOP_STRING: "stop_sequence",
}


@dataclass(frozen=True, slots=True)
class Style:
    """How one request is answered: ``model`` by name, ``tier`` as usage says it.

    ``caches`` says that usage tells what was computed already, ``hushed`` that thoughts have no
    text.
    """

    model: str
    tier: str
    caches: bool
    hushed: bool

    def head(self, message_id: str, content: list[Json], counts: Json) -> Json:
        """Returns a message that has not ended."""
        return {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counts,
        }

    def usage(self, prompt_tokens: int, cached_tokens: int, generated_tokens: int) -> Json:
        """Returns the token counts; what was read from the cache is no part of the input tokens."""
        cached = cached_tokens if self.caches else 0
        return {
            "input_tokens": prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": generated_tokens,
        }


def new_id() -> str:
    """Returns the id of a new message."""
    return f"msg_{uuid4().hex}"


def tool_id(call_id: str) -> str:
    """Returns the id of a call as Anthropic's look; the chat's own are OpenAI's."""
    return f"toolu_{call_id.removeprefix('call_')}"


def ending(finish: ChatFinish) -> Json:
    """Returns why an answer ended."""
    if finish.called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reason = STOP_REASON[finish.finish.reason]
    return {"stop_reason": reason, "stop_sequence": finish.finish.stop}


@dataclass(slots=True)
class Block:
    """A block that is being made: how it begins, and the pieces that have come."""

    start: Json
    pieces: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Json:
        """The block with all its pieces. The input of a call that was cut short may be no JSON."""
        said = "".join(self.pieces)
        match self.start["type"]:
            case "thinking":
                return {**self.start, "thinking": said}
            case "text":
                return {**self.start, "text": said}
            case _:
                return {**self.start, "input": _object(said)}


@dataclass(frozen=True, slots=True)
class Change:
    """One step in the making of an answer: the block ``index`` begins, goes on, or ends.

    ``start`` is the beginning of a block, ``delta`` what comes to it; both None say its end.
    """

    index: int
    start: Json | None = None
    delta: Json | None = None


class Blocks:
    """The blocks of one answer; ``push`` tells how a chunk changes them."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._blocks: list[Block] = []
        self._open = ""

    @property
    def whole(self) -> list[Json]:
        """All blocks as they are now."""
        return [block.whole for block in self._blocks]

    def push(self, chunk: ChatChunk) -> Iterator[Change]:
        """Takes a chunk. Thoughts are before text, and text before calls."""
        if chunk.reasoning:
            yield from self._enter("thinking", dict(THINKING))
            if not self._style.hushed:
                yield self._add(chunk.reasoning, "thinking_delta", "thinking")
        if chunk.text:
            yield from self._enter("text", {"type": "text", "text": ""})
            yield self._add(chunk.text, "text_delta", "text")
        for call in chunk.calls:
            yield from self._call(call)
        if chunk.finish is not None:
            yield from self._leave()

    def _call(self, call: CallDelta) -> Iterator[Change]:
        if call.id is not None:
            start: Json = {
                "type": "tool_use",
                "id": tool_id(call.id),
                "name": call.name,
                "input": {},
            }
            yield from self._enter(f"call {call.index}", start)
        if call.arguments:
            yield self._add(call.arguments, "input_json_delta", "partial_json")

    def _enter(self, kind: str, start: Json) -> Iterator[Change]:
        """Begins a block, unless the last one is of this kind and goes on."""
        if self._open == kind:
            return
        yield from self._leave()
        self._open = kind
        self._blocks.append(Block(start))
        yield Change(len(self._blocks) - 1, start=start)

    def _add(self, piece: str, kind: str, name: str) -> Change:
        self._blocks[-1].pieces.append(piece)
        return Change(len(self._blocks) - 1, delta={"type": kind, name: piece})

    def _leave(self) -> Iterator[Change]:
        if self._open:
            self._open = ""
            yield Change(len(self._blocks) - 1)


class MessageEvents:
    """Makes the events of one stream."""

    def __init__(self, style: Style, prompt_tokens: int) -> None:
        self._style = style
        self._prompt_tokens = prompt_tokens
        self._blocks = Blocks(style)
        self._begun = False

    def of(self, chunk: ChatChunk) -> bytes:
        """Returns the events of a chunk; none if it has nothing for the client."""
        events = [] if self._begun else self._begin()
        events += [_change(change) for change in self._blocks.push(chunk)]
        if chunk.finish is not None:
            finish = chunk.finish.finish
            counts = self._style.usage(
                finish.prompt_tokens, finish.cached_tokens, finish.generated_tokens
            )
            events.append(event("message_delta", delta=ending(chunk.finish), usage=counts))
            events.append(event("message_stop"))
        return b"".join(events)

    def _begin(self) -> list[bytes]:
        self._begun = True
        counts = self._style.usage(self._prompt_tokens, 0, 0)
        counts["service_tier"] = self._style.tier
        return [event("message_start", message=self._style.head(new_id(), [], counts)), PING]


def whole_message(style: Style, blocks: Blocks, chat: ChatFinish) -> Json:
    """Returns a whole answer."""
    finish = chat.finish
    counts = style.usage(finish.prompt_tokens, finish.cached_tokens, finish.generated_tokens)
    counts["service_tier"] = style.tier
    return {**style.head(new_id(), blocks.whole, counts), **ending(chat)}


def _change(change: Change) -> bytes:
    if change.start is not None:
        return event("content_block_start", index=change.index, content_block=change.start)
    if change.delta is not None:
        return event("content_block_delta", index=change.index, delta=change.delta)
    return event("content_block_stop", index=change.index)


def event(kind: str, **fields: Any) -> bytes:
    """Returns one event, named on a line of its own, as Anthropic's clients read them."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


def _object(text: str) -> Json:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
