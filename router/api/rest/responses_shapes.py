"""Answers in the shape of OpenAI's responses, and the events by which they come about.

Whole answers and streams are made by the same steps, so that they cannot differ.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from time import time
from typing import Any
from uuid import uuid4

import orjson

from router.api.rest.chat_shapes import BytesOf, token_logprob
from router.api.rest.openai_shapes import cut_tops
from router.ask import TokenOut
from router.conversation import CallDelta, ChatChunk, ChatFinish
from router.core.events import Reason
from router.errors import Fault, RequestError

Json = dict[str, Any]
FAILURE_CODES = {Fault.OVERLOADED: "rate_limit_exceeded", Fault.VALIDATION: "invalid_prompt"}
"""What OpenAI calls the failures that are not the server's."""


class Recorder:
    """Makes the events of one answer, and with them the answer, ``response``.

    ``echo`` are the fields of the request that come back. ``tops`` is the number of likeliest
    tokens to report, or None for no log probabilities.
    """

    def __init__(self, model: str, echo: Json, tops: int | None, bytes_of: BytesOf) -> None:
        self.response: Json = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **echo,
        }
        self._tops = tops
        self._bytes_of = bytes_of
        self._sequence = 0
        self._item: Json | None = None
        self._text: list[str] = []
        self._logprobs: list[Json] = []
        self._tokens: list[TokenOut] = []
        self._call = -1

    def begin(self) -> Iterator[Json]:
        """The events before the first item."""
        yield self._event("response.created", response=self._snapshot())
        yield self._event("response.in_progress", response=self._snapshot())

    def add(self, chunk: ChatChunk) -> Iterator[Json]:
        """The events of a chunk; with the last one everything is complete."""
        if chunk.reasoning:
            self._tokens.clear()
            yield from self._thoughts(chunk.reasoning)
        if self._tops is not None and not chunk.calls and not chunk.reasoning:
            # Tokens whose text is held back are reported with the text.
            self._tokens += chunk.tokens
        if chunk.text:
            yield from self._said(chunk.text)
        for delta in chunk.calls:
            self._tokens.clear()
            yield from self._called(delta)
        if chunk.finish is not None:
            yield from self._finish(chunk.finish)

    def fail(self, error: RequestError) -> Json:
        """The event of an answer that breaks off."""
        code = FAILURE_CODES.get(error.fault, "server_error")
        self.response |= {
            "status": "failed",
            "error": {"code": code, "message": error.message},
        }
        return self._event("response.failed", response=self._snapshot())

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _snapshot(self) -> Json:
        """The answer as it is now; events are written before it changes."""
        return {**self.response, "output": [*self.response["output"]]}

    @property
    def _at(self) -> Json:
        """Where the item in hand is."""
        assert self._item is not None
        return {"output_index": len(self.response["output"]), "item_id": self._item["id"]}

    def _open(self, prefix: str, **fields: Any) -> Iterator[Json]:
        yield from self._close("completed" if self._is_whole() else "incomplete")
        self._item = {"id": f"{prefix}_{uuid4().hex}", "status": "in_progress", **fields}
        self._text, self._logprobs = [], []
        index = len(self.response["output"])
        added = self._event("response.output_item.added", output_index=index, item={**self._item})
        yield added
        if "content" in fields:
            part = self._part("", ())
            yield self._event("response.content_part.added", **self._at, content_index=0, part=part)

    def _is_open(self, kind: str) -> bool:
        return self._item is not None and self._item["type"] == kind

    def _is_whole(self) -> bool:
        """Whether the item in hand is all there: the arguments of a call may break off."""
        if not self._is_open("function_call"):
            return True
        try:
            return isinstance(json.loads("".join(self._text)), dict)
        except (ValueError, RecursionError):
            return False

    def _part(self, text: str, logprobs: Sequence[Json]) -> Json:
        if self._is_open("reasoning"):
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": [*logprobs],
        }

    def _thoughts(self, text: str) -> Iterator[Json]:
        if not self._is_open("reasoning"):
            yield from self._open(
                "rs", type="reasoning", summary=[], content=[], encrypted_content=None
            )
        self._text.append(text)
        yield self._event("response.reasoning_text.delta", **self._at, content_index=0, delta=text)

    def _said(self, text: str) -> Iterator[Json]:
        if not self._is_open("message"):
            yield from self._open("msg", type="message", role="assistant", content=[])
        logprobs = [*self._logprobs_of(self._tokens)]
        self._tokens.clear()
        self._text.append(text)
        self._logprobs += logprobs
        yield self._event(
            "response.output_text.delta",
            **self._at,
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )

    def _called(self, delta: CallDelta) -> Iterator[Json]:
        if delta.id is not None:
            yield from self._open(
                "fc",
                type="function_call",
                call_id=delta.id,
                name=delta.name,
                arguments="",
            )
        if delta.arguments:
            self._text.append(delta.arguments)
            yield self._event(
                "response.function_call_arguments.delta", **self._at, delta=delta.arguments
            )

    def _close(self, status: str) -> Iterator[Json]:
        """Ends the item in hand, if there is one."""
        item, text = self._item, "".join(self._text)
        if item is None:
            return
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event(
                "response.function_call_arguments.done",
                **self._at,
                name=item["name"],
                arguments=text,
            )
        else:
            thought = item["type"] == "reasoning"
            kind = "reasoning_text" if thought else "output_text"
            more = {} if thought else {"logprobs": self._logprobs}
            part = self._part(text, self._logprobs)
            where = {**self._at, "content_index": 0}
            yield self._event(f"response.{kind}.done", **where, text=text, **more)
            yield self._event("response.content_part.done", **where, part=part)
            item["content"] = [part]
        item["status"] = status
        index = len(self.response["output"])
        yield self._event("response.output_item.done", output_index=index, item=item)
        self.response["output"].append(item)
        self._item = None

    def _finish(self, chat: ChatFinish) -> Iterator[Json]:
        cut = chat.finish.reason is Reason.LENGTH
        if self._item is None:
            yield from self._open("msg", type="message", role="assistant", content=[])
        yield from self._close("completed" if self._is_whole() and not cut else "incomplete")
        status = "incomplete" if cut else "completed"
        self.response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time()),
            "usage": usage(chat),
        }
        yield self._event(f"response.{status}", response=self._snapshot())

    def _logprobs_of(self, tokens: Iterable[TokenOut]) -> Iterator[Json]:
        for token in cut_tops(tokens, self._tops or 0):
            if not token.special:
                yield token_logprob(token, self._bytes_of)


def usage(chat: ChatFinish) -> Json:
    """Returns the token counts of an answer."""
    finish = chat.finish
    return {
        "input_tokens": finish.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finish.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": finish.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": chat.reasoning_tokens},
        "total_tokens": finish.prompt_tokens + finish.generated_tokens,
    }


def written(events: Iterable[Json]) -> bytes:
    """Returns events as a stream has them."""
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
        for event in events
    )
