"""What answers in OpenAI's shapes have in common: the head, token counts, log probabilities."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from time import time
from typing import Any
from uuid import uuid4

import orjson

from router.api.rest.asks import TIERS, priority
from router.api.rest.models_openai import SamplingFields
from router.ask import Finish, TokenOut
from router.core.events import Reason
from router.fleet import ModelCard

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


class Head:
    """What all parts of one answer have in common."""

    def __init__(self, prefix: str, kind: str, name: str, body: SamplingFields, model: ModelCard):
        options = body.stream_options
        self.counted = bool(options is not None and options.include_usage)
        self.fields: Json = {
            "id": f"{prefix}-{uuid4().hex}",
            "object": kind,
            "created": int(time()),
            "model": name,
            "system_fingerprint": fingerprint(model),
        }
        if body.service_tier is not None:
            self.fields["service_tier"] = TIERS[priority(body)]

    def event(self, choices: Sequence[Json], counts: Json | None = None, **more: Any) -> bytes:
        """Returns an event of a stream; those without counts say so if the last one has them."""
        usage = {"usage": counts} if self.counted else {}
        fields = {**self.fields, "choices": choices, **usage, **more}
        return b"data: " + orjson.dumps(fields) + b"\n\n"

    def prepared(self, index: int, opening: bytes, closing: bytes) -> tuple[bytes, bytes]:
        """Returns what is before and behind the one thing that changes from event to event.

        ``opening`` and ``closing`` are what stands around it within the choice.
        """
        fields = orjson.dumps(self.fields)[:-1]
        usage = b',"usage":null' if self.counted else b""
        before = b'data: %b,"choices":[{"index":%d,%b' % (fields, index, opening)
        return before, b'%b,"logprobs":null,"finish_reason":null}]%b}\n\n' % (closing, usage)


def fingerprint(model: ModelCard) -> str:
    """Returns a name for what computes a model's answers: it changes when one of its parts does."""
    parts = [model.id]
    for group in model.groups:
        parts += [group.engine, group.engine_version, group.device, group.dtype, str(group.world)]
        parts.append(group.tokenizer_sha256)
    return "fp_" + sha256("\0".join(parts).encode()).hexdigest()[:10]


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


def ids_of(tokens: Iterable[TokenOut]) -> list[int]:
    """Returns the ids of tokens, as vLLM's `token_ids` has them: those that end an answer, too."""
    return [token.id for token in tokens]


def finite(logprob: float | None) -> float:
    """Returns a log probability that JSON can hold."""
    return LOGPROB_MIN if logprob is None else max(logprob, LOGPROB_MIN)


def cut_tops(tokens: Iterable[TokenOut], count: int) -> list[TokenOut]:
    """Returns tokens with at most so many likeliest ones beside each.

    Those of prompt and answer are computed in one number, and may have been asked for in two.
    """
    return [
        token if len(token.top) <= count else replace(token, top=token.top[:count])
        for token in tokens
    ]


def prompt_logprobs(tokens: Sequence[TokenOut], count: int) -> list[Json | None]:
    """Returns what vLLM's `prompt_logprobs` reports: null for the first token, then all by id."""
    return [
        None if token.logprob is None else _position(token) for token in cut_tops(tokens, count)
    ]


def _position(token: TokenOut) -> Json:
    own: Json = {"logprob": finite(token.logprob), "rank": token.rank, "decoded_token": token.text}
    return {str(token.id): own} | {
        str(entry): {"logprob": finite(logprob), "rank": rank, "decoded_token": text}
        for rank, (entry, text, logprob) in enumerate(token.top, 1)
    }
