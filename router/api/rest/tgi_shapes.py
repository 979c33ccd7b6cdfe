"""Answers in TGI's shapes: events, details, whole answers."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import orjson

from router.api.rest.collect import Whole
from router.api.rest.sse import EventWriter
from router.ask import Chunk, Finish, TokenOut
from router.config import Settings
from router.core.events import Reason
from router.fleet import ModelCard
from router.generation import Generation
from router.text.tokenizer import TokenSpan

FINISH_REASON = {
    Reason.EOS: "eos_token",
    Reason.LENGTH: "length",
    Reason.STOP_STRING: "stop_sequence",
    Reason.STOP_TOKEN: "stop_sequence",
}

Json = dict[str, Any]
IsSpecial = Callable[[int], bool]
"""Whether a token of the model is special."""


def token(out: TokenOut) -> Json:
    """Returns a token; orjson writes a log probability of minus infinity as null, as TGI does."""
    return {"id": out.id, "text": out.text, "logprob": out.logprob, "special": out.special}


def top_tokens(out: TokenOut, is_special: IsSpecial) -> list[Json]:
    """Returns the likeliest tokens at a token's position: as many as asked for, also in a tie."""
    return [
        {"id": id_, "text": text, "logprob": logprob, "special": is_special(id_)}
        for id_, text, logprob in out.top
    ]


def details(answer: Whole, is_special: IsSpecial) -> Json:
    """Returns the details of a whole answer."""
    finish = answer.finish
    found: Json = {
        "finish_reason": FINISH_REASON[finish.reason],
        "generated_tokens": finish.generated_tokens,
        "seed": finish.seed,
        "prefill": [
            {"id": out.id, "text": out.text, "logprob": out.logprob} for out in finish.prompt
        ],
        "tokens": [token(out) for out in answer.tokens],
    }
    if any(out.top for out in answer.tokens):
        found["top_tokens"] = [top_tokens(out, is_special) for out in answer.tokens]
    return found


def likeliest(answers: Sequence[Whole]) -> list[Whole]:
    """Returns the answers, the likeliest per token first, as TGI ranks them."""
    return sorted(answers, key=lambda answer: answer.mean_logprob, reverse=True)


def whole(answers: Sequence[Whole], prefix: str, with_details: bool, is_special: IsSpecial) -> Json:
    """Returns the likeliest of the answers; ``prefix`` goes in front of every text."""
    ranked = likeliest(answers)
    best = ranked[0]
    body: Json = {"generated_text": prefix + best.finish.text}
    if with_details:
        body["details"] = details(best, is_special)
        if len(ranked) > 1:
            body["details"]["best_of_sequences"] = [
                {"generated_text": prefix + other.finish.text, **details(other, is_special)}
                for other in ranked[1:]
            ]
    return body


class Events:
    """Writes one answer as TGI's events: one for each token, counted from 1."""

    def __init__(self, prefix: str, with_details: bool, is_special: IsSpecial) -> None:
        self._prefix = prefix
        self._details = with_details
        self._is_special = is_special
        self._index = 0
        self._last_id = 0

    async def write(self, answer: Generation, writer: EventWriter) -> bytes:
        """Writes all events but those of the last chunk, which it returns."""
        async for chunk in answer:
            events = self.of(chunk)
            if chunk.finish is not None:
                return events
            if events:
                await writer.write(events)
        raise AssertionError("an answer ends with a finish or an error")

    def of(self, chunk: Chunk) -> bytes:
        """Returns the events of a chunk, empty if it has no token."""
        outs = chunk.tokens
        finish = chunk.finish
        if finish is not None and not outs:
            # The text is on the last token's event; an empty special one stands for it here.
            outs = (TokenOut(self._last_id, "", special=True),)
        events = []
        for out in outs:
            self._index += 1
            event: Json = {"index": self._index, "token": token(out)}
            if out.top:
                event["top_tokens"] = top_tokens(out, self._is_special)
            event["generated_text"] = None
            event["details"] = None
            if finish is not None and out is outs[-1]:
                event["generated_text"] = self._prefix + finish.text
                event["details"] = self._finish_details(finish)
            events.append(b"data:" + orjson.dumps(event) + b"\n\n")
        if outs:
            self._last_id = outs[-1].id
        return b"".join(events)

    def _finish_details(self, finish: Finish) -> Json | None:
        if not self._details:
            return None
        return {
            "finish_reason": FINISH_REASON[finish.reason],
            "generated_tokens": finish.generated_tokens,
            "seed": finish.seed,
            "input_length": finish.prompt_tokens,
        }


def simple_tokens(text: str, found: Iterable[TokenSpan]) -> list[Json]:
    """Returns the body of ``/tokenize``; TGI counts bytes, the tokenizer code points."""
    at = _byte_offsets(text)
    return [
        {"id": id_, "text": piece, "start": at[start], "stop": at[end]}
        for id_, piece, start, end in found
    ]


def _byte_offsets(text: str) -> Sequence[int]:
    """Returns the UTF-8 offset of each code point, and the length at the end."""
    if text.isascii():
        return range(len(text) + 1)
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    return offsets


def info(model: ModelCard, settings: Settings, version: str) -> Json:
    """Returns the body of ``/info``."""
    return {
        "model_id": model.id,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stop_sequences,
        "max_input_tokens": model.max_input_tokens,
        "max_total_tokens": model.max_total_tokens,
        "validation_workers": 1,
        "max_client_batch_size": settings.max_client_batch_size,
        "router": "roundhouse",
        "version": version,
        "sha": None,
        "docker_label": None,
    }
