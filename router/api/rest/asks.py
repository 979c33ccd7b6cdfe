"""From request bodies to asks: what OpenAI's parameters mean in the router's words."""

from dataclasses import replace
from typing import TypeVar

from router.api.rest.models_openai import SamplingFields
from router.api.rest.openai_formats import constraint_of
from router.ask import Ask, Params
from router.config import Settings
from router.conversation import ChatAsk
from router.errors import Fault, RequestError
from router.validation import SMALLEST_SHARE

SEEDS = 2**64
PRIORITIES = {"priority": 0, "fast": 0, "flex": 2}
"""The place in the queue that a service tier stands for; smaller goes first. All others: 1."""
TIERS = ("priority", "default", "flex")
"""What an answer calls the places in the queue."""

A = TypeVar("A", Ask, ChatAsk)


def invalid(message: str, field: str | None = None) -> RequestError:
    """Returns a validation error."""
    return RequestError(Fault.VALIDATION, message, field)


def unsupported(field: str, advice: str = "leave it out") -> RequestError:
    """Returns the error for a field, or a value of it, that nothing here can honour."""
    return RequestError(Fault.UNSUPPORTED, f"`{field}` is not supported: {advice}", field)


def model_name(name: str | None) -> str | None:
    """Returns the model asked for; Hugging Face's clients send the endpoint's URL as its name."""
    if name is None or name.startswith(("http://", "https://")):
        return None
    return name


def check_stops(stops: list[str], settings: Settings) -> None:
    """Checks the number of stop strings, in the words of TGI. Raises RequestError."""
    limit = settings.max_stop_sequences
    if len(stops) > limit:
        text = f"`stop` supports up to {limit} stop sequences. Given: {len(stops)}"
        raise invalid(text, "stop")


def openai_params(body: SamplingFields, settings: Settings) -> Params:
    """Returns the parameters that both of OpenAI's routes share. Raises RequestError."""
    _check_counts(body, settings)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check_stops(stops, settings)
    if "" in stops:
        raise invalid("a stop string cannot be empty", "stop")
    return Params(
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=0 if body.top_k in (None, -1) else body.top_k or 0,
        # OpenAI takes 0, which leaves the likeliest token alone.
        top_p=1.0 if body.top_p is None else body.top_p or SMALLEST_SHARE,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        seed=None if body.seed is None or body.temperature == 0 else body.seed % SEEDS,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop=tuple(stops),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        prompt_logprobs=body.prompt_logprobs is not None,
        ranks=body.prompt_logprobs is not None,
        constraint=constraint_of(body),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _check_counts(body: SamplingFields, settings: Settings) -> None:
    n, limit = body.n or 1, settings.max_concurrent_requests
    if n > limit:
        raise invalid(f"n must be at most {limit}, not {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream = true", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise unsupported("prompt_logprobs", "leave it out, or do not stream")
    for field, least in (("max_tokens", 1), ("min_tokens", 0), ("top_k", -1)):
        value = getattr(body, field)
        if value is not None and value < least:
            raise invalid(f"{field} must be at least {least}, not {value}", field)


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 11):
            raise invalid("the keys of logit_bias are token ids, as strings", "logit_bias")
        pairs.append((int(key), value))
    return tuple(pairs)


def fan_out(ask: A, count: int) -> list[A]:
    """Returns the ask ``count`` times; a given seed is counted up, so that the answers differ."""
    seed = ask.params.seed
    if seed is None:
        return [ask] * count
    return [
        replace(ask, params=replace(ask.params, seed=(seed + number) % SEEDS))
        for number in range(count)
    ]


def priority(body: SamplingFields) -> int:
    """Returns the place in the queue that the service tier stands for; smaller goes first."""
    return PRIORITIES.get(body.service_tier or "", 1)
