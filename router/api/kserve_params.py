"""How a request of the Open Inference Protocol asks for text, by the names of Triton's backends.

A name may come in the request's ``parameters``, in the JSON object of the input
``sampling_parameters`` (as Triton's vLLM backend takes them), or as an input of its own (as its
TensorRT-LLM backend does); the latter go before the former. Numbers and switches may be written as
text. A name that has no meaning here is refused, since nothing is left out silently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from router.api import grpc_convert as convert
from router.api.kserve_tensors import Tensor, parameter_of
from router.ask import Ask, Constraint, Params
from router.errors import Fault, RequestError
from router.kserve.v1 import inference_pb2 as pb
from router.text import constraints

Values = Mapping[str, Any]

ALIASES = {
    "max_new_tokens": "max_tokens",
    "request_output_len": "max_tokens",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "random_seed": "seed",
    "stop_words": "stop",
    "len_penalty": "length_penalty",
    "num_return_sequences": "n",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
NUMBERS = (
    *("temperature", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
WHOLE_NUMBERS = ("max_tokens", "min_tokens", "top_k", "seed")
SWITCHES = {
    "ignore_eos": "ignore_eos",
    "include_stop_str_in_output": "include_stop",
    "skip_special_tokens": "skip_special_tokens",
}
LISTS = frozenset({"stop", "stop_token_ids", "bad_words", "choice"})
RETURNS = {
    "return_finish_reason": ("finish_reason",),
    "return_cumulative_logprob": ("cumulative_logprob",),
    "return_logprobs": ("logprobs",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
}
OUTPUTS = ("text_output", *(name for names in RETURNS.values() for name in names))
LOGPROB_OUTPUTS = frozenset({"cumulative_logprob", "logprobs", "cum_log_probs", "output_log_probs"})
ONLY = ("n", "best_of", "beam_width")
"""What there is one of."""
NEVER = ("use_beam_search", "return_context_logits", "return_generation_logits")
CONSTRAINTS = ("json_object", "json_schema", "regex", "choice", "grammar")
OTHERS = frozenset(
    {
        *("stream", "exclude_input_in_output", "end_id", "logprobs", "logit_bias", "lora_name"),
        *("priority", "timeout", "truncate_prompt_tokens"),
        *("guided_decoding_guide_type", "guided_decoding_guide"),
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "pad_id",  # nothing is padded
        *("length_penalty", "early_stopping", "beam_search_diversity_rate"),  # are of beam search
        *("headers", "binary_data_output"),  # are of HTTP
    }
)
KNOWN = (
    LISTS
    | OTHERS
    | WITHOUT_EFFECT
    | {*NUMBERS, *WHOLE_NUMBERS, *SWITCHES, *RETURNS, *ONLY, *NEVER, *CONSTRAINTS}
)
TENSORS = frozenset({"text_input", "sampling_parameters"})


FIELDS = {
    "prompt": "text_input",
    "adapter": "lora_name",
    "top_logprobs": "logprobs",
    "model": "model_name",
    "truncate": "truncate_prompt_tokens",
}

WORDS = {
    "`inputs`": "`text_input`",
    "`max_new_tokens`": "`max_tokens`",
    "`top_n_tokens`": "`logprobs`",
    "`adapter_id`": "`lora_name`",
    "`truncate`": "`truncate_prompt_tokens`",
}
"""Names that messages of the service use, which are TGI's, and Triton's for the same."""


def field_name(field: str) -> str:
    """Returns what a field of an ask is called here."""
    return FIELDS.get(field, field)


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for one prompt.

    ``echo`` puts the prompt before the answer; ``outputs`` are the names of the tensors to send.
    """

    ask: Ask
    stream: bool
    echo: bool
    outputs: tuple[str, ...]


def values_of(
    request: pb.ModelInferRequest, inputs: Mapping[str, Tensor], index: int, rows: int
) -> Values:
    """Returns everything said about one of the prompts, by name. Raises RequestError."""
    found: dict[str, Any] = {}
    for name, given in request.parameters.items():
        if not name.startswith("triton_"):
            found[_known(name)] = parameter_of(given)
    listed = inputs.get("sampling_parameters")
    if listed is not None and listed.values:
        if listed.datatype != "BYTES":
            raise _invalid("`sampling_parameters` must be BYTES: a JSON object", listed.name)
        row = listed.row(index, rows)
        for name, value in convert.json_object(row[0], listed.name).items():
            found[_known(name)] = value
    for name, tensor in inputs.items():
        if name in TENSORS or not tensor.values:
            continue
        known, row = _known(name), tensor.row(index, rows)
        if known not in LISTS and len(row) != 1:
            raise _invalid(f"`{name}` must have one element for each prompt", name)
        found[known] = list(row) if known in LISTS else row[0]
    return {name: value for name, value in found.items() if value is not None}


def _known(name: str) -> str:
    known = ALIASES.get(name, name)
    if known not in KNOWN:
        text = f"`{name[:100]}` is no input or parameter of text generation here: leave it out"
        raise RequestError(Fault.UNSUPPORTED, text, name[:100])
    return known


def wish_of(
    prompt: str, values: Values, request: pb.ModelInferRequest, left_s: float | None
) -> Wish:
    """Returns what is asked for a prompt. ``left_s`` is what remains of the call's deadline."""
    _refuse(values)
    outputs = _outputs_of(values, request)
    stream = _switch(values, "stream", False)
    ask = Ask(
        prompt=prompt,
        params=_params_of(values, bool(LOGPROB_OUTPUTS.intersection(outputs))),
        model=request.model_name or None,
        truncate=_whole(values, "truncate_prompt_tokens"),
        priority=_priority(values),
        deadline_s=_deadline_s(values, left_s),
        adapter=str(values.get("lora_name", "")),
    )
    # Triton's vLLM backend puts the prompt before an answer unless it streams, or is told not to.
    return Wish(ask, stream, not _switch(values, "exclude_input_in_output", stream), outputs)


def _refuse(values: Values) -> None:
    for name in ONLY:
        if _whole(values, name) not in (None, 1):
            text = f"`{name}` must be 1 or left out: send a request for each answer"
            raise RequestError(Fault.UNSUPPORTED, text, name)
    for name in NEVER:
        if _switch(values, name, False):
            raise RequestError(Fault.UNSUPPORTED, f"`{name}` is not supported: leave it out", name)
    if any(_texts(values, "bad_words")):
        text = "`bad_words` is not supported: forbid tokens with `logit_bias`"
        raise RequestError(Fault.UNSUPPORTED, text, "bad_words")


def _outputs_of(values: Values, request: pb.ModelInferRequest) -> tuple[str, ...]:
    """The tensors that the client listed or, if it listed none, those that it set switches for."""
    if request.outputs:
        asked = [output.name for output in request.outputs]
        unknown = next((name for name in asked if name not in OUTPUTS), None)
        if unknown is not None:
            text = f"there is no output `{unknown[:100]}`; there are: {', '.join(OUTPUTS)}"
            raise _invalid(text, "outputs")
        return tuple(dict.fromkeys(asked))
    flagged = (names for flag, names in RETURNS.items() if _switch(values, flag, False))
    return ("text_output", *(name for names in flagged for name in names))


def _params_of(values: Values, logprobs: bool) -> Params:
    fields: dict[str, Any] = {name: _number(values, name) for name in NUMBERS if name in values}
    fields |= {name: _whole(values, name) for name in WHOLE_NUMBERS if name in values}
    fields |= {
        field: _switch(values, name, False) for name, field in SWITCHES.items() if name in values
    }
    if fields.get("top_k") == -1:  # vLLM's way of saying that it is off
        fields["top_k"] = 0
    if fields.get("top_p") == 0:  # TensorRT-LLM's way
        fields["top_p"] = 1.0
    ends = (*_list(values, "stop_token_ids"), *_list(values, "end_id"))
    top = _whole(values, "logprobs") or 0
    return Params(
        **fields,
        stop=tuple(text for text in _texts(values, "stop") if text),
        stop_token_ids=tuple(_whole_number(end, "stop_token_ids") for end in ends),
        logit_bias=_bias(values),
        logprobs=logprobs,
        top_logprobs=top if logprobs else 0,
        constraint=_constraint_of(values),
    )


def _bias(values: Values) -> tuple[tuple[int, float], ...]:
    """What vLLM calls ``logit_bias``: an object from token ids to numbers, perhaps as JSON text."""
    given = values.get("logit_bias", {})
    pairs = convert.json_object(given, "logit_bias") if isinstance(given, str) else given
    try:
        return tuple(sorted((int(token), float(bias)) for token, bias in pairs.items()))
    except (AttributeError, TypeError, ValueError) as error:
        text = "`logit_bias` must be a JSON object from token ids to numbers"
        raise _invalid(text, "logit_bias") from error


def _constraint_of(values: Values) -> Constraint | None:
    guide = values.get("guided_decoding_guide_type")
    if guide is not None:
        values = {**values, **_guide(str(guide), values.get("guided_decoding_guide", ""))}
    given = [name for name in CONSTRAINTS if name in values]
    if len(given) > 1:
        raise _invalid(f"`{given[0]}` and `{given[1]}` exclude each other", given[1])
    for name in given:
        return _MAKERS[name](values)
    return None


def _guide(kind: str, guide: Any) -> dict[str, Any]:
    """TensorRT-LLM's two names for a constraint, as ours for it."""
    names = {"json_schema": "json_schema", "regex": "regex", "ebnf_grammar": "grammar"}
    if kind == "json":
        return {"json_object": True}
    if kind not in names:
        text = f"`guided_decoding_guide_type` must be one of json, {', '.join(names)}"
        raise _invalid(text, "guided_decoding_guide_type")
    return {names[kind]: guide}


def _schema(values: Values) -> Constraint:
    given = values["json_schema"]
    if isinstance(given, str):
        return convert.schema_constraint(given, "json_schema")
    return constraints.json_schema(given, "json_schema")


_MAKERS: Mapping[str, Callable[[Values], Constraint | None]] = {
    "json_object": lambda values: (
        constraints.json_object("json_object") if _switch(values, "json_object", False) else None
    ),
    "json_schema": _schema,
    "regex": lambda values: constraints.regex(values["regex"], "regex"),
    "choice": lambda values: constraints.choice(_texts(values, "choice"), "choice"),
    "grammar": lambda values: constraints.grammar(values["grammar"], "grammar"),
}


def _priority(values: Values) -> int:
    """Triton's 1 is the highest; 0, and what is past the lowest, mean the default."""
    given = _whole(values, "priority") or 0
    return given - 1 if 1 <= given <= 4 else convert.PRIORITY


def _deadline_s(values: Values, left_s: float | None) -> float | None:
    """The sooner of the call's deadline and Triton's ``timeout``, which is in microseconds."""
    timeout = _whole(values, "timeout") or 0
    limits = [left_s, min(timeout, 2**63) / 1e6 if timeout > 0 else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _number(values: Values, name: str) -> float:
    value = values[name]
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise _invalid(f"`{name}` must be a number", name) from error


def _whole(values: Values, name: str) -> int | None:
    return _whole_number(values[name], name) if name in values else None


def _whole_number(value: Any, name: str) -> int:
    try:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return int(str(value))  # a large seed would lose its last digits as a float
    except ValueError as error:
        raise _invalid(f"`{name}` must be a whole number", name) from error


def _switch(values: Values, name: str, default: bool) -> bool:
    value = values.get(name, default)
    switches = {"true": True, "1": True, "false": False, "0": False}
    found = switches.get(str(value).lower())
    if found is None:
        raise _invalid(f"`{name}` must be true or false", name)
    return found


def _list(values: Values, name: str) -> Sequence[Any]:
    """A list, which may be written as JSON text, or one value by itself."""
    value = values.get(name, [])
    if isinstance(value, str) and value.startswith("["):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return [value]  # a text that happens to begin like a list
    return value if isinstance(value, list) else [value]


def _texts(values: Values, name: str) -> list[str]:
    found = _list(values, name)
    if not all(isinstance(text, str) for text in found):
        raise _invalid(f"`{name}` must be a text or a list of texts", name)
    return list(found)


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
