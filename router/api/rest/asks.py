"""From request bodies to asks: what OpenAI's parameters mean in the router's words."""

from dataclasses import replace
from typing import Any

from router.api.rest.models_openai import ChatRequest, CompletionRequest, SamplingFields
from router.ask import Ask, Params
from router.config import Settings
from router.errors import Fault, RequestError

SEEDS = 2**64


def invalid(message: str, field: str | None = None) -> RequestError:
    """Returns a validation error."""
    return RequestError(Fault.VALIDATION, message, field)


def unsupported(field: str) -> RequestError:
    """Returns the error for a field whose meaning the router does not have yet."""
    return RequestError(Fault.UNSUPPORTED, f"`{field}` is not supported yet: leave it out", field)


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
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        seed=None if body.seed is None or body.temperature == 0 else body.seed % SEEDS,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop=tuple(stops),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )


def _check_counts(body: SamplingFields, settings: Settings) -> None:
    n, limit = body.n or 1, settings.max_concurrent_requests
    if n > limit:
        raise invalid(f"n must be at most {limit}, not {n}", "n")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream = true", "stream_options")
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


PRIORITIES = {"priority": 0, "flex": 2}


def fan_out(ask: Ask, count: int) -> list[Ask]:
    """Returns the ask ``count`` times; a given seed is counted up, so that the answers differ."""
    seed = ask.params.seed
    if seed is None:
        return [ask] * count
    return [
        replace(ask, params=replace(ask.params, seed=(seed + number) % SEEDS))
        for number in range(count)
    ]


def chat_params(body: ChatRequest, settings: Settings) -> Params:
    """Returns the parameters of a chat request. Raises RequestError."""
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    if body.max_completion_tokens is not None:
        if body.max_completion_tokens < 1:
            text = f"max_completion_tokens must be at least 1, not {body.max_completion_tokens}"
            raise invalid(text, "max_completion_tokens")
        body.max_tokens = body.max_completion_tokens
    return replace(
        openai_params(body, settings),
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
    )


def completion_asks(body: CompletionRequest, settings: Settings) -> list[Ask]:
    """Returns the asks of a completion request, n for each prompt in turn. Raises RequestError."""
    if body.echo and body.logprobs is not None:
        text = "`echo` with `logprobs` is not supported yet: leave one of them out"
        raise RequestError(Fault.UNSUPPORTED, text, "echo")
    params = replace(
        openai_params(body, settings),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
    )
    asks: list[Ask] = []
    for prompt in prompts_of(body, settings):
        ask = Ask(
            prompt=prompt, params=params, model=model_name(body.model), priority=priority(body)
        )
        asks += fan_out(ask, body.n or 1)
    if len(asks) > settings.max_concurrent_requests:
        limit = settings.max_concurrent_requests
        raise invalid(f"prompts times n must be at most {limit}, not {len(asks)}", "n")
    return asks


def priority(body: SamplingFields) -> int:
    """Returns the place in the queue that the service tier stands for; smaller goes first."""
    return PRIORITIES.get(body.service_tier or "", 1)


def prompts_of(body: CompletionRequest, settings: Settings) -> list[str | tuple[int, ...]]:
    """Returns the prompts of a completion request, as text or token ids. Raises RequestError."""
    given: Any = body.prompt
    many = isinstance(given, list) and not (given and isinstance(given[0], int))
    prompts: list[Any] = given if many else [given]
    limit = settings.max_client_batch_size
    if len(prompts) > limit:
        raise invalid(f"at most {limit} prompts go into one request, not {len(prompts)}", "prompt")
    if not prompts or not all(prompts):
        raise invalid("prompt cannot be empty", "prompt")
    out: list[str | tuple[int, ...]] = []
    for prompt in prompts:
        ids = not isinstance(prompt, str)
        if ids and min(prompt) < 0:
            raise invalid("token ids cannot be negative", "prompt")
        out.append(tuple(prompt) if ids else prompt)
    return out
