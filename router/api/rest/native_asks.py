"""From TGI's request bodies to asks: what its parameters mean in the router's words."""

from typing import Any

import orjson

from router.api.rest.asks import check_stops, invalid, model_name
from router.api.rest.models_tgi import GenerateParameters, GenerateRequest, Grammar
from router.ask import Ask, Constraint, Params
from router.config import Settings
from router.fleet import ModelCard
from router.text import constraints


def native_asks(
    body: GenerateRequest, settings: Settings, model: ModelCard, stream: bool
) -> list[Ask]:
    """Returns the asks of a TGI request: one, or as many as best_of.

    Raises RequestError in the words of TGI (router/src/validation.rs, `ValidationError`).
    """
    given = body.parameters or GenerateParameters(do_sample=True)
    several = (given.best_of or 1) > 1
    # Greedy answers would all be the same: with best_of any parameter of sampling turns it on.
    sampling = given.do_sample or _any_warper(given) or (several and given.temperature is not None)
    _check_native(given, settings, stream, sampling)
    if not body.inputs:
        raise invalid("`inputs` cannot be empty", "inputs")
    reports = stream or wants_details(given) or several
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
        prompt_logprobs=given.decoder_input_details,
        constraint=None if given.grammar is None else constraint_of(given.grammar),
        watermark=given.watermark,
    )
    ask = Ask(
        prompt=body.inputs,
        params=params,
        model=model_name(body.model),
        truncate=given.truncate,
        adapter=given.adapter_id or "",
    )
    return [ask] * (given.best_of or 1)


def wants_details(given: GenerateParameters) -> bool:
    """Whether a whole answer has details: `decoder_input_details` alone asks for them, too."""
    return given.details or given.decoder_input_details


def constraint_of(grammar: Grammar) -> Constraint:
    """Returns what a `grammar` asks for.

    Beside TGI's shapes these are taken: OpenAI's `json_schema`, any JSON object for a `json_object`
    without a value, and any JSON schema, where TGI needs `properties` at its top. Raises
    RequestError.
    """
    field, value = "grammar", grammar.value
    match grammar.type:
        case "regex":
            return constraints.regex(_text(value, grammar.type), field)
        case "grammar":
            return constraints.grammar(_text(value, grammar.type), field)
        case "choice":
            if not isinstance(value, list):
                raise invalid("grammar is not valid: a choice needs a list of texts", field)
            return constraints.choice(value, field)
        case "json_object" if value is None:
            return constraints.json_object(field)
        case "json_schema":
            holder = _parsed(value if value is not None else grammar.json_schema)
            if not isinstance(holder, dict) or "schema" not in holder:
                raise invalid('grammar is not valid: json_schema needs {"schema": ...}', field)
            return constraints.json_schema(_schema(_parsed(holder["schema"])), field)
        case _:
            return constraints.json_schema(_schema(_parsed(value)), field)


def _text(value: Any, kind: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"grammar is not valid: the value of a {kind} is a text", "grammar")
    return value


def _parsed(value: Any) -> Any:
    """Returns a value, or what a text says in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise invalid(f"grammar is not valid: {error}", "grammar") from None


def _schema(value: Any) -> Any:
    if not isinstance(value, dict | bool):
        raise invalid("grammar is not valid: a JSON schema is an object", "grammar")
    return value


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
    if given.decoder_input_details and stream:
        text = "`decoder_input_details` == true is not supported when streaming tokens"
        raise invalid(text, "decoder_input_details")
    for field, value in (
        ("temperature", given.temperature),
        ("repetition_penalty", given.repetition_penalty),
        ("top_k", given.top_k),
    ):
        if value is not None and value <= 0:
            raise invalid(f"`{field}` must be strictly positive", field)
    if not -2.0 <= (given.frequency_penalty or 0.0) <= 2.0:
        text = "`frequency_penalty` must be >= -2.0 and <= 2.0"
        raise invalid(text, "frequency_penalty")
    if given.max_new_tokens is not None and given.max_new_tokens <= 0:
        raise invalid("`max_new_tokens` must be strictly positive", "max_new_tokens")
    check_stops(given.stop, settings)
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
    if settings.max_best_of == 1:
        raise invalid("`best_of` != 1 is not allowed for this endpoint", "best_of")
    if not 0 < best_of <= settings.max_best_of:
        text = f"`best_of` must be > 0 and <= {settings.max_best_of}. Given: {best_of}"
        raise invalid(text, "best_of")
    if not sampling:
        raise invalid("you must use sampling when `best_of` is > 1", "best_of")
    if given.seed is not None:
        raise invalid("`seed` must not be set when `best_of` > 1", "seed")
    if stream:
        raise invalid("`best_of` != 1 is not supported when streaming tokens", "best_of")
