"""Chat answers in OpenAI's shapes: whole ones, and the events of a stream as prepared bytes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import orjson

from router.api.rest.collect import WholeChat
from router.api.rest.models_chat import ChatRequest
from router.api.rest.openai_shapes import FINISH_REASON, Head, Json, cut_tops, finite, ids_of
from router.ask import TokenOut
from router.chat import ChatGeneration
from router.conversation import Call, CallDelta, ChatChunk, ChatFinish

BytesOf = Callable[[int, str], bytes]
"""The bytes of a token that adds this text: ``Tokenizer.token_bytes``."""


@dataclass(frozen=True, slots=True)
class Style:
    """How answers to one request are written.

    ``tops`` is the number of likeliest tokens to report, or None for no log probabilities;
    ``legacy`` says that calls go by OpenAI's older name, functions; ``ids`` that the ids of tokens
    are reported.
    """

    tops: int | None
    legacy: bool
    ids: bool
    bytes_of: BytesOf

    @classmethod
    def of(cls, body: ChatRequest, legacy: bool, bytes_of: BytesOf) -> "Style":
        """The style that a request asks for."""
        tops = (body.top_logprobs or 0) if body.logprobs else None
        return cls(tops, legacy, bool(body.return_token_ids), bytes_of)

    def logprobs(self, tokens: Iterable[TokenOut]) -> Json | None:
        """Returns the log probabilities of tokens, if they were asked for."""
        if self.tops is None:
            return None
        # Special tokens are no part of the content.
        content = [
            token_logprob(token, self.bytes_of)
            for token in cut_tops(tokens, self.tops)
            if not token.special
        ]
        return {"content": content, "refusal": None}

    def token_ids(self, tokens: Iterable[TokenOut]) -> Json:
        """Returns a choice's field with the ids of tokens, if they were asked for."""
        return {"token_ids": ids_of(tokens)} if self.ids else {}

    def reason(self, finish: ChatFinish) -> str:
        """Returns why an answer ended."""
        if finish.called:
            return "function_call" if self.legacy else "tool_calls"
        return FINISH_REASON[finish.finish.reason]


def token_logprob(token: TokenOut, bytes_of: BytesOf) -> Json:
    """Returns the log probabilities of one token and of the likeliest beside it."""

    def entry(id_: int, text: str, logprob: float | None) -> Json:
        return {"token": text, "logprob": finite(logprob), "bytes": list(bytes_of(id_, text))}

    likely = [entry(*one) for one in token.top]
    return {**entry(token.id, token.text, token.logprob), "top_logprobs": likely}


def chat_choice(index: int, answer: WholeChat, style: Style) -> Json:
    """Returns one whole chat answer."""
    chat = answer.chat
    message: Json = {
        "role": "assistant",
        "content": None if chat.calls and not chat.text else chat.text,
        "refusal": None,
    }
    if chat.reasoning:
        message |= _thoughts(chat.reasoning)
    if chat.calls and style.legacy:
        message["function_call"] = _function(chat.calls[0])
    elif chat.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _function(call)} for call in chat.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": style.logprobs(answer.tokens),
        "finish_reason": style.reason(chat),
        **style.token_ids(answer.tokens),
    }


def _function(call: Call) -> Json:
    return {"name": call.name, "arguments": call.arguments}


def _thoughts(text: str) -> Json:
    """Thoughts by both names that clients look for: DeepSeek's, and vLLM's newer one."""
    return {"reasoning_content": text, "reasoning": text}


class ChatEvents:
    """Makes the events of one choice. The first has the role, the last the finish reason.

    All of an event but the text is the same from chunk to chunk, so it is prepared once.
    """

    def __init__(self, head: Head, index: int, style: Style) -> None:
        self._head = head
        self._index = index
        self._style = style
        self._first = True
        self._prompt_ids: Sequence[int] = ()
        self._before, self._after = head.prepared(index, b'"delta":{"content":', b"}")

    def begin(self, answer: ChatGeneration) -> None:
        """Says which answer the chunks will be of."""
        self._prompt_ids = answer.prompt_ids

    def of(self, chunk: ChatChunk) -> bytes:
        """Returns the event of a chunk; empty if it has nothing for the client."""
        if (
            self._first
            or chunk.finish is not None
            or self._style.tops is not None
            or self._style.ids
            or chunk.calls
            or chunk.reasoning
        ):
            return self._full(chunk)
        if not chunk.text:
            return b""
        return self._before + orjson.dumps(chunk.text) + self._after

    def _full(self, chunk: ChatChunk) -> bytes:
        delta = self._delta(chunk)
        first = self._first and self._style.ids
        more: Json = {"prompt_token_ids": self._prompt_ids} if first else {}
        self._first = False
        choice = {
            "index": self._index,
            "delta": delta,
            "logprobs": self._style.logprobs(chunk.tokens),
            "finish_reason": self._style.reason(chunk.finish) if chunk.finish else None,
            **self._style.token_ids(chunk.tokens),
        }
        return self._head.event([choice], **more)

    def _delta(self, chunk: ChatChunk) -> Json:
        delta: Json = {}
        if self._first:
            silent = chunk.reasoning or chunk.calls
            delta = {"role": "assistant", "content": None if silent else "", "refusal": None}
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.reasoning:
            delta |= _thoughts(chunk.reasoning)
        if chunk.calls and self._style.legacy:
            delta["function_call"] = _function_delta(chunk.calls)
        elif chunk.calls:
            delta["tool_calls"] = list(map(_call_delta, chunk.calls))
        return delta


def _call_delta(call: CallDelta) -> Json:
    function = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }


def _function_delta(calls: Sequence[CallDelta]) -> Json:
    """The one call of an answer that speaks of functions."""
    first = [call for call in calls if call.index == 0]
    function: Json = {"arguments": "".join(call.arguments for call in first)}
    for call in first:
        if call.name is not None:
            function["name"] = call.name
    return function
