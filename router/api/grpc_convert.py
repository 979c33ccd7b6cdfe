"""Between ``router.v1`` messages and the router's own types."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import orjson

from router.api.rest.errors import WORDS
from router.ask import Ask, Constraint, EmbedAsk, Embedded, Params
from router.conversation import ChatAsk
from router.errors import Fault, RequestError
from router.fleet import GroupCard, ModelCard
from router.text import constraints
from router.text.tokenizer import TokenSpan
from router.v1 import router_pb2 as pb

PRIORITY = 1
SEEDS = 2**64


Asked = TypeVar("Asked", Ask, ChatAsk)


def priority_of(request: pb.GenerateRequest | pb.ChatRequest) -> int:
    """Returns the place in the queue; smaller goes first."""
    return request.priority if request.HasField("priority") else PRIORITY


def params_of(given: pb.Parameters) -> Params:
    """Returns the parameters; what is unset has its neutral value."""

    def optional(field: str, neutral: float) -> float:
        return getattr(given, field) if given.HasField(field) else neutral

    return Params(
        max_tokens=given.max_tokens if given.HasField("max_tokens") else None,
        min_tokens=given.min_tokens,
        temperature=optional("temperature", 1.0),
        top_k=given.top_k,
        top_p=optional("top_p", 1.0),
        min_p=given.min_p,
        typical_p=optional("typical_p", 1.0),
        repetition_penalty=optional("repetition_penalty", 1.0),
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=given.seed if given.HasField("seed") else None,
        logit_bias=tuple(sorted(given.logit_bias.items())),
        stop=tuple(given.stop),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        include_stop=given.include_stop,
        logprobs=given.logprobs,
        top_logprobs=given.top_logprobs,
        prompt_logprobs=given.prompt_logprobs,
        constraint=constraint_of(given.constraint, "constraint"),
        skip_special_tokens=(
            given.skip_special_tokens if given.HasField("skip_special_tokens") else True
        ),
        ranks=given.ranks,
        watermark=given.watermark,
    )


def constraint_of(given: pb.Constraint, field: str) -> Constraint | None:
    """Returns what the answer must match, if anything. Raises RequestError, VALIDATION."""
    match given.WhichOneof("kind"):
        case "json_object":
            return constraints.json_object(f"{field}.json_object")
        case "json_schema":
            return schema_constraint(given.json_schema, f"{field}.json_schema")
        case "regex":
            return constraints.regex(given.regex, f"{field}.regex")
        case "choice":
            return constraints.choice(given.choice.options, f"{field}.choice")
        case "grammar":
            return constraints.grammar(given.grammar, f"{field}.grammar")
    return None


def schema_constraint(text: str, field: str) -> Constraint:
    """Returns the constraint of a JSON schema in JSON text. Raises RequestError, VALIDATION."""
    return constraints.json_schema(_parsed(text, field), field)


def json_object(text: str, field: str) -> Mapping[str, Any]:
    """Returns the JSON object in a text. Raises RequestError, VALIDATION."""
    value = _parsed(text, field)
    if not isinstance(value, dict):
        raise RequestError(Fault.VALIDATION, f"`{field}` must be a JSON object", field)
    return value


def _parsed(text: str, field: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        message = f"`{field}` is not JSON: {error.msg} at {where}"
        raise RequestError(Fault.VALIDATION, message, field) from error


def fan_out(ask: Asked, count: int) -> list[Asked]:
    """Returns the ask ``count`` times; a given seed is counted up, so that the answers differ."""
    seed = ask.params.seed
    if seed is None or count < 2:
        return [ask] * max(count, 1)
    return [
        replace(ask, params=replace(ask.params, seed=(seed + number) % SEEDS))
        for number in range(count)
    ]


def words_of(prompt: str) -> dict[str, str]:
    """OpenAI's words for TGI's, which are ours here, with the field that holds the prompt."""
    return {**WORDS, "`inputs`": f"`{prompt}`", "`adapter_id`": "`adapter`"}


def prompt_field(request: pb.GenerateRequest | pb.ChatRequest) -> str:
    """Returns the name of the field that holds the prompt."""
    if isinstance(request, pb.ChatRequest):
        return "messages"
    return request.WhichOneof("input") or "input"


def generate_ask(request: pb.GenerateRequest, deadline_s: float | None) -> Ask:
    """Returns the ask of a Generate call. Raises RequestError if there is no prompt."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestError(Fault.VALIDATION, "set text or token_ids", "input")
    return Ask(
        prompt=request.text if kind == "text" else tuple(request.token_ids.ids),
        params=params_of(request.parameters),
        model=request.model or None,
        add_special_tokens=(
            request.add_special_tokens if request.HasField("add_special_tokens") else True
        ),
        truncate=request.truncate if request.HasField("truncate") else None,
        priority=priority_of(request),
        deadline_s=deadline_s,
        adapter=request.adapter,
    )


def embed_ask(request: pb.EmbedRequest, deadline_s: float | None) -> EmbedAsk:
    """Returns the ask of an Embed call. Raises RequestError if an input is neither."""
    inputs: list[str | tuple[int, ...]] = []
    for number, one in enumerate(request.inputs):
        kind = one.WhichOneof("input")
        if kind is None:
            raise RequestError(Fault.VALIDATION, "set text or token_ids", f"inputs[{number}]")
        inputs.append(one.text if kind == "text" else tuple(one.token_ids.ids))
    return EmbedAsk(tuple(inputs), request.model or None, deadline_s)


def embeddings_of(embedded: Embedded) -> pb.EmbedResponse:
    """Returns the answer to Embed."""
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector) for vector in embedded.vectors],
        prompt_tokens=embedded.prompt_tokens,
    )


def tokens_of(found: Iterable[TokenSpan]) -> list[pb.Token]:
    """Returns the tokens of a text."""
    return [pb.Token(id=id_, text=text, start=start, end=end) for id_, text, start, end in found]


def model_of(card: ModelCard) -> pb.Model:
    """Returns the entry of a model in ListModels."""
    return pb.Model(
        id=card.id,
        max_total_tokens=card.max_total_tokens,
        max_input_tokens=card.max_input_tokens,
        groups=[_group_of(group) for group in card.groups],
        adapters=card.adapters,
        features=card.features,
    )


def _group_of(card: GroupCard) -> pb.Group:
    return pb.Group(
        name=card.name,
        engine=card.engine,
        engine_version=card.engine_version,
        device=card.device,
        dtype=card.dtype,
        world=card.world,
        ready=card.ready,
        adapters=card.adapters,
    )
