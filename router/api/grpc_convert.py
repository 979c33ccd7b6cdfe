"""Between ``router.v1`` messages and the router's own types."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from router.ask import Ask, EmbedAsk, Embedded, Finish, Params, TokenOut
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.fleet import GroupCard, ModelCard
from router.text.tokenizer import TokenSpan
from router.v1 import router_pb2 as pb

FINISH_REASON = {
    Reason.LENGTH: pb.FINISH_REASON_LENGTH,
    Reason.EOS: pb.FINISH_REASON_EOS_TOKEN,
    Reason.STOP_STRING: pb.FINISH_REASON_STOP_SEQUENCE,
    Reason.STOP_TOKEN: pb.FINISH_REASON_STOP_SEQUENCE,
}
ROLES = ("system", "user", "assistant", "tool")
PRIORITY = 1

M = TypeVar("M", bound=Message)


def decoder(kind: type[M]) -> Callable[[bytes], M | None]:
    """Returns a parser that gives None for bytes that are no such message.

    grpcio answers a parser that raises with INTERNAL; the caller can say INVALID_ARGUMENT.
    """

    def decode(data: bytes) -> M | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return decode


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
    )


def generate_ask(request: pb.GenerateRequest, deadline_s: float | None) -> Ask:
    """Returns the ask of a Generate call. Raises RequestError if there is no prompt."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestError(Fault.VALIDATION, "set text or token_ids", "input")
    return Ask(
        prompt=request.text if kind == "text" else tuple(request.token_ids.ids),
        params=params_of(request.parameters),
        model=request.model or None,
        priority=request.priority if request.HasField("priority") else PRIORITY,
        deadline_s=deadline_s,
        adapter=request.adapter,
    )


def chat_messages(request: pb.ChatRequest) -> list[dict[str, str]]:
    """Returns the conversation for the chat template. Raises RequestError for an unknown role."""
    for number, message in enumerate(request.messages):
        if message.role not in ROLES:
            text = f"the role must be one of {', '.join(ROLES)}"
            raise RequestError(Fault.VALIDATION, text, f"messages[{number}].role")
    return [{"role": message.role, "content": message.content} for message in request.messages]


def chat_ask(request: pb.ChatRequest, prompt: str, deadline_s: float | None) -> Ask:
    """Returns the ask of a Chat call, from what the template made of its messages."""
    return Ask(
        prompt=prompt,
        params=params_of(request.parameters),
        model=request.model or None,
        add_special_tokens=False,
        priority=request.priority if request.HasField("priority") else PRIORITY,
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


def message_of(
    tokens: Iterable[TokenOut], text: str, finish: Finish | None, params: pb.Parameters
) -> pb.GenerateResponse:
    """Returns the message for tokens, the text that became final with them, and the end."""
    message = pb.GenerateResponse(token_ids=[token.id for token in tokens], text=text)
    if params.logprobs or params.top_logprobs:
        message.logprobs.extend(
            float("nan") if token.logprob is None else token.logprob for token in tokens
        )
    if params.top_logprobs:
        for token in tokens:
            message.top_logprobs.add(
                token_ids=[id_ for id_, _, _ in token.top],
                logprobs=[logprob for _, _, logprob in token.top],
            )
    if finish is not None:
        message.finish.CopyFrom(finish_of(finish))
    return message


def finish_of(finish: Finish) -> pb.Finish:
    """Returns the message about an answer's end."""
    return pb.Finish(
        reason=FINISH_REASON[finish.reason],
        prompt_tokens=finish.prompt_tokens,
        generated_tokens=finish.generated_tokens,
        cached_tokens=finish.cached_tokens,
        seed=finish.seed,
        stop=finish.stop or "",
    )


def tokens_of(found: Iterable[TokenSpan]) -> pb.TokenizeResponse:
    """Returns the answer to Tokenize."""
    return pb.TokenizeResponse(
        tokens=[
            pb.Token(id=id_, text=text, start=start, end=end) for id_, text, start, end in found
        ]
    )


def model_of(card: ModelCard) -> pb.Model:
    """Returns the entry of a model in ListModels."""
    return pb.Model(
        id=card.id,
        max_total_tokens=card.max_total_tokens,
        max_input_tokens=card.max_input_tokens,
        groups=[_group_of(group) for group in card.groups],
        adapters=card.adapters,
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
