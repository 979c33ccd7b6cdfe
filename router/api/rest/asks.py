"""From request bodies to asks: what TGI's and OpenAI's parameters mean in the router's words."""

from dataclasses import replace
from typing import Any

from router.api.rest.models_openai import ChatRequest, CompletionRequest, SamplingFields
from router.api.rest.models_tgi import GenerateParameters, GenerateRequest
from router.ask import Ask, Params
from router.config import Settings
from router.errors import Fault, RequestError
from router.fleet import ModelCard

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


def native_asks(
    body: GenerateRequest, settings: Settings, model: ModelCard, stream: bool
) -> list[Ask]:
    """Returns the asks of a TGI request: one, or as many as best_of.

    Raises RequestError in the words of TGI (router/src/validation.rs, `ValidationError`).
    """
    given = body.parameters or GenerateParameters(do_sample=True)
    sampling = given.do_sample or _any_warper(given)
    _check_native(given, settings, stream, sampling)
    if not body.inputs:
        raise invalid("`inputs` cannot be empty", "inputs")
    reports = stream or given.details or (given.best_of or 1) > 1
    params = Params(
        max_tokens=given.max_new_tokens,
        temperature=(1.0 if given.temperature is None else given.temperature) if sampling else 0.0,
        top_k=given.top_k or 0,
        top_p=1.0 if given.top_p is None else given.top_p,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        frequency_penalty=given.frequency_penalty or 0.0,
        seed=given.seed if sampling else None,
        stop=tuple(given.stop),
        include_stop=True,
        # TGI reports them unasked; an engine that has none answers with null.
        logprobs=reports and "logprobs" in model.features,
        top_logprobs=given.top_n_tokens or 0,
    )
    ask = Ask(
        prompt=body.inputs,
        params=params,
        truncate=given.truncate,
        adapter=given.adapter_id or "",
    )
    return [ask] * (given.best_of or 1)


def _any_warper(given: GenerateParameters) -> bool:
    return (
        given.temperature not in (None, 1.0)
        or given.top_k is not None
        or given.top_p not in (None, 1.0)
        or given.typical_p not in (None, 1.0)
    )


def _check_native(
    given: GenerateParameters, settings: Settings, stream: bool, sampling: bool
) -> None:
    """The checks that are TGI's own, in its order; the service makes the others."""
    _check_best_of(given, settings, stream, sampling)
    if given.decoder_input_details:
        if stream:
            text = "`decoder_input_details` == true is not supported when streaming tokens"
            raise invalid(text, "decoder_input_details")
        raise unsupported("decoder_input_details")
    for field in ("watermark", "grammar"):
        if getattr(given, field):
            raise unsupported(field)
    for field, value in (
        ("temperature", given.temperature),
        ("repetition_penalty", given.repetition_penalty),
        ("top_k", given.top_k),
    ):
        if value is not None and value <= 0:
            raise invalid(f"`{field}` must be strictly positive", field)
    if given.max_new_tokens is not None and given.max_new_tokens <= 0:
        raise invalid("`max_new_tokens` must be strictly positive", "max_new_tokens")
    if given.truncate is not None and given.truncate <= 0:
        raise invalid("`truncate` must be strictly positive", "truncate")
    _check_stops(given.stop, settings)
    top_n = given.top_n_tokens or 0
    if top_n > settings.max_top_n_tokens:
        limit = settings.max_top_n_tokens
        text = f"`top_n_tokens` must be >= 0 and <= {limit}. Given: {top_n}"
        raise invalid(text, "top_n_tokens")


def _check_best_of(
    given: GenerateParameters, settings: Settings, stream: bool, sampling: bool
) -> None:
    best_of = 1 if given.best_of is None else given.best_of
    if best_of == 1:
        return
    if not 0 < best_of <= settings.max_best_of:
        text = f"`best_of` must be > 0 and <= {settings.max_best_of}. Given: {best_of}"
        raise invalid(text, "best_of")
    if not sampling:
        raise invalid("you must use sampling when `best_of` is > 1", "best_of")
    if given.seed is not None:
        raise invalid("`seed` must not be set when `best_of` > 1", "seed")
    if stream:
        raise invalid("`best_of` != 1 is not supported when streaming tokens", "best_of")


def _check_stops(stops: list[str], settings: Settings) -> None:
    limit = settings.max_stop_sequences
    if len(stops) > limit:
        text = f"`stop` supports up to {limit} stop sequences. Given: {len(stops)}"
        raise invalid(text, "stop")


def openai_params(body: SamplingFields, settings: Settings) -> Params:
    """Returns the parameters that both of OpenAI's routes share. Raises RequestError."""
    _check_counts(body, settings)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    _check_stops(stops, settings)
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
