"""What a request may ask for, checked before anything else happens to it.

Messages are in the words of text-generation-inference (router/src/validation.rs,
``ValidationError``), whose REST face puts "Input validation error: " before them; its names for
parameters differ from ours (``max_new_tokens`` for ``max_tokens``, ``inputs`` for ``prompt``,
``top_n_tokens`` for ``top_logprobs``). ``RequestError.field`` is always the name in ``Params`` or
``Ask``. Where the range here is wider than TGI's, the message says ours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from router.ask import Ask, Constraint, ConstraintKind, Params
from router.config import Settings
from router.errors import Fault, RequestError, TooLongError
from router.fleet import ModelCard
from shards.v1 import shard_pb2

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken as 0: dividing by them leaves the range of float32."""
SMALLEST_SHARE = 1e-6
"""The least top_p and typical_p that is sent: smaller ones would be 0 as float32, which is off."""
STOP_CHARS_MAX = 1024
LIST_MAX = 1024
"""Entries that logit_bias and stop_token_ids may have: they travel with every admission."""
PRIORITY_MAX = 3
# What OpenAI allows, and the operator may raise. TGI's routes keep to max_top_n_tokens as it is.
TOP_LOGPROBS_MAX = 20

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0, 100),
    ("repetition_penalty", 0.001, 1000),
    ("frequency_penalty", -2, 2),
    ("presence_penalty", -2, 2),
    ("min_p", 0, 1),
    ("top_k", 0, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
)
_SHARES = ("top_p", "typical_p")


def invalid(message: str, field: str) -> RequestError:
    """The error for a parameter that is out of its range."""
    return RequestError(Fault.VALIDATION, message, field)


def check_ask(ask: Ask, card: ModelCard, settings: Settings) -> None:
    """Checks everything that needs no tokenising.

    Raises RequestError, VALIDATION or UNSUPPORTED.
    """
    params = ask.params
    _check_ranges(params)
    if params.max_tokens is not None and params.max_tokens < 1:
        raise invalid("`max_new_tokens` must be strictly positive", "max_tokens")
    _check_stops(params.stop, settings.max_stop_sequences)
    if params.seed is not None and not 0 <= params.seed < 2**64:
        raise invalid(f"`seed` must be >= 0 and < 2^64. Given: {params.seed}", "seed")
    top, top_max = params.top_logprobs, max(TOP_LOGPROBS_MAX, settings.max_top_n_tokens)
    if not 0 <= top <= top_max:
        raise invalid(f"`top_n_tokens` must be >= 0 and <= {top_max}. Given: {top}", "top_logprobs")
    _check_ids(params, card.vocab_size)
    if len(ask.prompt) == 0:
        raise invalid("`inputs` cannot be empty", "prompt")
    if not isinstance(ask.prompt, str):
        check_vocabulary(ask.prompt, card.vocab_size, "prompt")
    _check_terms(ask, card)
    _check_adapter(ask, card)
    if params.constraint is not None and settings.disable_grammar_support:
        text = "grammar is not supported: this server was started with disable_grammar_support"
        raise invalid(text, params.constraint.field)
    _check_constraint(params)
    _check_features(params, card)


def _check_constraint(params: Params) -> None:
    """A constraint decides where an answer may end, and sometimes that it must."""
    if params.constraint is None:
        return
    for name in ("min_tokens", "ignore_eos"):
        if getattr(params, name):
            raise invalid(
                f"`{name}` cannot be combined with `{params.constraint.field}`: an answer ends "
                "where it is complete",
                name,
            )


def _check_ranges(params: Params) -> None:
    for name, low, high in _RANGES:
        value = getattr(params, name)
        if not low <= value <= high:  # NaN fails every comparison
            raise invalid(f"`{name}` must be >= {low} and <= {high}. Given: {value}", name)
    for name in _SHARES:
        value = getattr(params, name)
        if not 0 < value <= 1:
            raise invalid(f"`{name}` must be > 0.0 and <= 1.0. Given: {value}", name)


def _check_stops(stops: tuple[str, ...], count_max: int) -> None:
    if len(stops) > count_max:
        raise invalid(
            f"`stop` supports up to {count_max} stop sequences. Given: {len(stops)}", "stop"
        )
    for stop in stops:
        if not stop:
            raise invalid("`stop` holds an empty stop sequence", "stop")
        if len(stop) > STOP_CHARS_MAX:
            raise invalid(
                f"`stop` supports up to {STOP_CHARS_MAX} characters each. Given: {len(stop)}",
                "stop",
            )


def _check_ids(params: Params, vocab_size: int) -> None:
    biased = [token for token, _ in params.logit_bias]
    for name, ids in (("logit_bias", biased), ("stop_token_ids", params.stop_token_ids)):
        if len(ids) > LIST_MAX:
            raise invalid(f"`{name}` supports up to {LIST_MAX} tokens. Given: {len(ids)}", name)
        check_vocabulary(ids, vocab_size, name)
    for _, bias in params.logit_bias:
        if not -100 <= bias <= 100:
            raise invalid(
                f"`logit_bias` values must be >= -100 and <= 100. Given: {bias}", "logit_bias"
            )


def check_vocabulary(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Checks that these are tokens of the model. Raises RequestError, VALIDATION."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        shown = "inputs" if name == "prompt" else name
        raise invalid(
            f"`{shown}` holds the token id {wrong}; this model's ids go from 0 to {vocab_size - 1}",
            name,
        )


def _check_terms(ask: Ask, card: ModelCard) -> None:
    if ask.truncate is not None and not 1 <= ask.truncate <= card.max_input_tokens:
        raise invalid(
            f"`truncate` must be strictly positive and less than {card.max_input_tokens + 1}. "
            f"Given: {ask.truncate}",
            "truncate",
        )
    if not 0 <= ask.priority <= PRIORITY_MAX:
        raise invalid(
            f"`priority` must be >= 0 and <= {PRIORITY_MAX}. Given: {ask.priority}", "priority"
        )
    if ask.deadline_s is not None and not 0 < ask.deadline_s < float("inf"):
        raise invalid(
            f"the deadline must be a positive number of seconds. Given: {ask.deadline_s}",
            "deadline_s",
        )


def with_adapter(ask: Ask, named: str) -> Ask:
    """The ask with the adapter that its model's name stands for, if that is one.

    Raises RequestError, VALIDATION, if it asks for another one.
    """
    if not named or ask.adapter == named:
        return ask
    if ask.adapter:
        text = f"the model is the adapter {named}, but `adapter_id` is {ask.adapter[:100]!r}"
        raise invalid(text, "adapter")
    return replace(ask, adapter=named)


def _check_adapter(ask: Ask, card: ModelCard) -> None:
    if ask.adapter and ask.adapter not in card.adapters:
        known = ", ".join(card.adapters) or "none"
        raise invalid(
            f"`adapter_id` {ask.adapter[:100]!r} is not loaded; adapters of {card.id}: {known}",
            "adapter",
        )


def _check_features(params: Params, card: ModelCard) -> None:
    lacking = [need for need in needs_of(params) if need not in card.features]
    if lacking:
        engines = " and ".join(sorted({group.engine for group in card.groups})) or "none"
        raise RequestError(
            Fault.UNSUPPORTED,
            f"the model {card.id} is served by the engine {engines}, which does not support "
            f"{_field(lacking[0], params)}: leave it out",
            _field(lacking[0], params),
        )


def _field(need: str, params: Params) -> str:
    """The parameter that asks for a feature."""
    if need == "grammar" and params.constraint is not None:
        return params.constraint.field
    if need != "penalties":
        return need
    if params.repetition_penalty != 1.0:
        return "repetition_penalty"
    return "frequency_penalty" if params.frequency_penalty else "presence_penalty"


def is_greedy(params: Params) -> bool:
    """Whether always the likeliest token is taken."""
    return params.temperature < GREEDY_BELOW


def needs_of(params: Params) -> tuple[str, ...]:
    """The engine features that a request really uses, by the names of ``DescribeResponse``."""
    penalised = params.repetition_penalty != 1.0 or (
        params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    )
    wanted = {
        "logprobs": _scores(params),
        "penalties": penalised,
        "seed": params.seed is not None and not is_greedy(params),
        "logit_bias": bool(params.logit_bias),
        "min_tokens": params.min_tokens > 0,
        "typical_p": params.typical_p < 1.0 and not is_greedy(params),
        "grammar": params.constraint is not None,
        "prompt_logprobs": params.prompt_logprobs,
        "ranks": params.ranks,
        "watermark": params.watermark,
    }
    return tuple(name for name, used in wanted.items() if used)


def tokens_allowed(prompt_tokens: int, params: Params, card: ModelCard) -> int:
    """How many tokens may be generated behind a prompt of this length.

    Raises RequestError, VALIDATION, if prompt and answer cannot fit.
    """
    if prompt_tokens == 0:
        raise invalid("`inputs` cannot be empty", "prompt")
    if prompt_tokens > card.max_input_tokens:
        raise TooLongError(
            f"`inputs` must have less than {card.max_input_tokens + 1} tokens. "
            f"Given: {prompt_tokens}",
            "prompt",
        )
    room = card.max_total_tokens - prompt_tokens
    allowed = max(room, 1) if params.max_tokens is None else params.max_tokens
    if allowed > room:
        raise TooLongError(
            f"`inputs` tokens + `max_new_tokens` must be <= {card.max_total_tokens}. "
            f"Given: {prompt_tokens} `inputs` tokens and {allowed} `max_new_tokens`",
            "max_tokens",
        )
    if params.min_tokens > allowed:
        raise invalid(
            f"`min_tokens` must be <= `max_new_tokens`. Given: {params.min_tokens} `min_tokens` "
            f"and {allowed} `max_new_tokens`",
            "min_tokens",
        )
    return allowed


def _scores(params: Params) -> bool:
    """Whether the log probabilities of drawn tokens are needed."""
    return params.logprobs or params.top_logprobs > 0 or params.ranks


def sampling_of(
    params: Params, seed: int | None, stop_tokens: frozenset[int], settings: Settings
) -> object:
    """The ``shards.v1.Sampling`` of a request; what is off is left at zero."""
    greedy = is_greedy(params)
    return shard_pb2.Sampling(
        temperature=0.0 if greedy else params.temperature,
        top_k=0 if greedy else params.top_k,
        top_p=_share(params.top_p, greedy),
        min_p=0.0 if greedy else params.min_p,
        typical_p=_share(params.typical_p, greedy),
        repetition_penalty=0.0 if params.repetition_penalty == 1.0 else params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=seed or 0,
        bias_tokens=[token for token, _ in params.logit_bias],
        bias_values=[value for _, value in params.logit_bias],
        min_tokens=params.min_tokens,
        stop_tokens=sorted(stop_tokens) if params.min_tokens else (),
        logprobs=_scores(params),
        top_logprobs=params.top_logprobs,
        prompt_logprobs=params.prompt_logprobs,
        constraint=None if params.constraint is None else constraint_of(params.constraint),
        ranks=params.ranks,
        watermark=_watermark(settings) if params.watermark else None,
    )


def _watermark(settings: Settings) -> shard_pb2.Watermark:
    """The mark of this server. It travels with the request, so that a resumed one keeps its own."""
    return shard_pb2.Watermark(
        gamma=settings.watermark_gamma,
        delta=settings.watermark_delta,
        key=settings.watermark_key,
    )


def constraint_of(constraint: Constraint) -> shard_pb2.Constraint:
    """The constraint as ``shards.v1`` has it."""
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return shard_pb2.Constraint(json_schema=constraint.text)
        case ConstraintKind.REGEX:
            return shard_pb2.Constraint(regex=constraint.text)
        case ConstraintKind.LARK:
            return shard_pb2.Constraint(lark=constraint.text)
        case _:
            assert_never(constraint.kind)


def _share(value: float, greedy: bool) -> float:
    return 0.0 if greedy or value == 1.0 else max(value, SMALLEST_SHARE)
