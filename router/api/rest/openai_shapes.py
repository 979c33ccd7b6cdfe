"""Answers in OpenAI's shapes: whole ones, and the events of a stream as prepared bytes."""

from collections.abc import Iterable, Sequence
from time import time
from typing import Any
from uuid import uuid4

import orjson

from router.api.rest.collect import Whole
from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason

FINISH_REASON = {
    Reason.EOS: "stop",
    Reason.STOP_STRING: "stop",
    Reason.STOP_TOKEN: "stop",
    Reason.LENGTH: "length",
}
LOGPROB_MIN = -9999.0
"""What OpenAI reports for a probability of zero, as JSON has no infinity."""

DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]


def finite(logprob: float | None) -> float:
    """Returns a log probability that JSON can hold."""
    return LOGPROB_MIN if logprob is None else max(logprob, LOGPROB_MIN)


def usage(finishes: Sequence[Finish], prompts: Sequence[Finish]) -> Json:
    """Returns the token counts: all answers of ``finishes``, each prompt of ``prompts`` once."""
    prompt = sum(finish.prompt_tokens for finish in prompts)
    completion = sum(finish.generated_tokens for finish in finishes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(finish.cached_tokens for finish in prompts)},
    }


def _logprob(text: str, logprob: float | None) -> Json:
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


def chat_logprobs(tokens: Iterable[TokenOut]) -> Json:
    """Returns the log probabilities of chat answers; special tokens are no part of the content."""
    content = []
    for token in tokens:
        if not token.special:
            entry = _logprob(token.text, token.logprob)
            entry["top_logprobs"] = [_logprob(text, logprob) for _, text, logprob in token.top]
            content.append(entry)
    return {"content": content}


def completion_logprobs(tokens: Iterable[TokenOut], offset: int, top: int) -> Json:
    """Returns the log probabilities of completions; ``offset`` is where the text starts."""
    texts: list[str] = []
    offsets: list[int] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    for token in tokens:
        if not token.special:
            texts.append(token.text)
            offsets.append(offset)
            logprobs.append(finite(token.logprob))
            tops.append({text: finite(logprob) for _, text, logprob in token.top})
            offset += len(token.text)
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }


class Head:
    """What all parts of one answer have in common."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{uuid4().hex}"
        self.kind = kind
        self.created = int(time())
        self.model = model

    def fields(self) -> Json:
        """Returns the fields that every object of the answer has."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
        }


def chat_choice(index: int, answer: Whole, logprobs: bool) -> Json:
    """Returns one whole chat answer."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": answer.finish.text},
        "logprobs": chat_logprobs(answer.tokens) if logprobs else None,
        "finish_reason": FINISH_REASON[answer.finish.reason],
    }


def completion_choice(index: int, answer: Whole, echo: str, top: int | None) -> Json:
    """Returns one whole completion; ``top`` is the request's `logprobs`."""
    logprobs = None if top is None else completion_logprobs(answer.tokens, len(echo), top)
    return {
        "index": index,
        "text": echo + answer.finish.text,
        "logprobs": logprobs,
        "finish_reason": FINISH_REASON[answer.finish.reason],
    }


class ChoiceEvents:
    """Makes the events of one choice of a stream.

    All of an event but the text is the same from chunk to chunk, so it is prepared once.
    """

    def __init__(self, head: Head, index: int) -> None:
        self._head = head
        self._index = index

    def of(self, chunk: Chunk) -> bytes:
        """Returns the event of a chunk; empty if it has nothing for the client."""
        raise NotImplementedError


class ChatEvents(ChoiceEvents):
    """Events of a chat answer. The first has the role, the last the finish reason."""

    def __init__(self, head: Head, index: int, logprobs: bool) -> None:
        super().__init__(head, index)
        self._logprobs = logprobs
        self._first = True
        fields = orjson.dumps(head.fields())[:-1]
        self._before = b'data: %b,"choices":[{"index":%d,"delta":{"content":' % (fields, index)
        self._after = b'},"logprobs":null,"finish_reason":null}]}\n\n'

    def of(self, chunk: Chunk) -> bytes:
        """Returns the event of a chunk; empty if it has nothing for the client."""
        if self._first or self._logprobs or chunk.finish is not None:
            return self._full(chunk)
        if not chunk.text:
            return b""
        return self._before + orjson.dumps(chunk.text) + self._after

    def _full(self, chunk: Chunk) -> bytes:
        delta = (
            {"role": "assistant", "content": chunk.text} if self._first else {"content": chunk.text}
        )
        self._first = False
        finish = chunk.finish
        choice = {
            "index": self._index,
            "delta": delta,
            "logprobs": chat_logprobs(chunk.tokens) if self._logprobs else None,
            "finish_reason": FINISH_REASON[finish.reason] if finish else None,
        }
        event = self._head.fields() | {"choices": [choice]}
        return b"data: " + orjson.dumps(event) + b"\n\n"


class CompletionEvents(ChoiceEvents):
    """Events of a completion. ``echo`` goes in front of the text of the first."""

    def __init__(self, head: Head, index: int, echo: str, top: int | None) -> None:
        super().__init__(head, index)
        self._echo = echo
        self._top = top
        self._offset = len(echo)
        fields = orjson.dumps(head.fields())[:-1]
        self._before = b'data: %b,"choices":[{"index":%d,"text":' % (fields, index)
        self._after = b',"logprobs":null,"finish_reason":null}]}\n\n'

    def of(self, chunk: Chunk) -> bytes:
        """Returns the event of a chunk; empty if it has nothing for the client."""
        if self._top is not None or chunk.finish is not None:
            return self._full(chunk)
        text, self._echo = self._echo + chunk.text, ""
        return self._before + orjson.dumps(text) + self._after if text else b""

    def _full(self, chunk: Chunk) -> bytes:
        finish, top = chunk.finish, self._top
        text, self._echo = self._echo + chunk.text, ""
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": (
                None if top is None else completion_logprobs(chunk.tokens, self._offset, top)
            ),
            "finish_reason": FINISH_REASON[finish.reason] if finish else None,
        }
        self._offset += sum(len(token.text) for token in chunk.tokens if not token.special)
        event = self._head.fields() | {"choices": [choice]}
        return b"data: " + orjson.dumps(event) + b"\n\n"


def usage_event(head: Head, counts: Json) -> bytes:
    """Returns the event that reports the token counts of a stream."""
    event = head.fields() | {"choices": [], "usage": counts}
    return b"data: " + orjson.dumps(event) + b"\n\n"
