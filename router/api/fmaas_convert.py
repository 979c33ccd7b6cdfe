"""Between ``fmaas`` messages and the router's own types.

The meaning of each field is that of IBM's text-generation-inference (``proto/generation.proto``
and ``router/src/validation.rs`` there) and of vLLM's adapter for its clients.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from router.api import grpc_convert as convert
from router.ask import Ask, Chunk, Constraint, Finish, Params, TokenOut
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.fleet import ModelCard
from router.fmaas.v1 import generation_pb2 as pb
from router.text import constraints

MAX_NEW_TOKENS = 20
"""What a client means that does not say how many tokens it wants."""

FIELDS = {
    "model": "model_id",
    "adapter": "adapter_id",
    "prompt": "request.text",
    "text": "request.text",
    "max_tokens": "params.stopping.max_new_tokens",
    "min_tokens": "params.stopping.min_new_tokens",
    "stop": "params.stopping.stop_sequences",
    "temperature": "params.sampling.temperature",
    "top_k": "params.sampling.top_k",
    "top_p": "params.sampling.top_p",
    "typical_p": "params.sampling.typical_p",
    "seed": "params.sampling.seed",
    "repetition_penalty": "params.decoding.repetition_penalty",
    "logprobs": "params.response.token_logprobs",
    "top_logprobs": "params.response.top_n_tokens",
    "prompt_logprobs": "params.response.input_tokens",
    "ranks": "params.response.token_ranks",
}

WORDS = {
    "`inputs`": "`text`",
    "`min_tokens`": "`min_new_tokens`",
    "`stop`": "`stop_sequences`",
}
"""Names that messages of the service use, which are TGI's, and TGIS's for the same."""


def field_name(field: str) -> str:
    """Returns what a field of an ask is called here."""
    return FIELDS.get(field, field)


@dataclass(frozen=True, slots=True)
class Order:
    """One generation as it was asked for.

    ``ids`` are the input's tokens after truncation. ``cut`` says that fewer tokens fit than were
    asked for; ``timed`` that the deadline of the ask is the client's limit for the answer.
    """

    ask: Ask
    card: ModelCard
    text: str
    ids: tuple[int, ...]
    options: pb.ResponseOptions
    cut: bool
    timed: bool

    @property
    def scored(self) -> bool:
        """Whether the input's tokens are listed with what only the engine knows of them."""
        return self.ask.params.prompt_logprobs


def order_of(
    request: pb.SingleGenerationRequest, card: ModelCard, ids: Sequence[int], left_s: float | None
) -> Order:
    """Returns the order for one input and its tokens. Raises RequestError.

    ``left_s`` is what remains of the call's deadline, in seconds, or None.
    """
    params = request.params
    if params.truncate_input_tokens:
        ids = ids[-params.truncate_input_tokens :]
    wanted = params.stopping.max_new_tokens or MAX_NEW_TOKENS
    # At least one: an input that leaves no room is refused for its length, not for this.
    room = max(1, card.max_total_tokens - len(ids))
    limit_s = params.stopping.time_limit_millis / 1000 or None
    timed = limit_s is not None and (left_s is None or limit_s < left_s)
    ask = Ask(
        prompt=tuple(ids),
        params=params_of(params, min(wanted, room)),
        model=card.id,
        deadline_s=limit_s if timed else left_s,
        adapter=request.adapter_id,
    )
    return Order(ask, card, request.request.text, tuple(ids), params.response, wanted > room, timed)


def params_of(given: pb.Parameters, max_tokens: int) -> Params:
    """Returns the parameters of an ask for at most so many tokens. Raises RequestError."""
    sampling, stopping, options = given.sampling, given.stopping, given.response
    greedy = given.method == pb.GREEDY
    _check_options(options)
    _check_decoding(given.decoding)
    detailed = options.token_logprobs or options.token_ranks or options.top_n_tokens > 0
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    return Params(
        max_tokens=max_tokens,
        min_tokens=stopping.min_new_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=0 if greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p or 1.0,
        typical_p=1.0 if greedy else sampling.typical_p or 1.0,
        repetition_penalty=given.decoding.repetition_penalty or 1.0,
        seed=sampling.seed if sampling.HasField("seed") and not greedy else None,
        stop=tuple(stopping.stop_sequences),
        include_stop=(
            stopping.include_stop_sequence if stopping.HasField("include_stop_sequence") else True
        ),
        logprobs=options.token_logprobs and options.generated_tokens,
        top_logprobs=options.top_n_tokens,
        prompt_logprobs=options.input_tokens and detailed,
        constraint=_constraint_of(given.decoding),
        ranks=options.token_ranks,
    )


def _check_options(options: pb.ResponseOptions) -> None:
    listed = options.input_tokens or options.generated_tokens
    if not listed and (options.token_logprobs or options.token_ranks or options.top_n_tokens):
        text = "details of tokens need `input_tokens` or `generated_tokens`, which list them"
        raise RequestError(Fault.VALIDATION, text, "params.response")


def _check_decoding(decoding: pb.DecodingParameters) -> None:
    if decoding.HasField("length_penalty") and decoding.length_penalty.decay_factor != 1.0:
        text = "`length_penalty` is not supported: leave it out, or set its decay_factor to 1"
        raise RequestError(Fault.UNSUPPORTED, text, "params.decoding.length_penalty")


def _constraint_of(decoding: pb.DecodingParameters) -> Constraint | None:
    kind = decoding.WhichOneof("guided")
    field = f"params.decoding.{kind}"
    match kind:
        case "format" if decoding.format == pb.DecodingParameters.JSON:
            return constraints.json_object(field)
        case "json_schema":
            return convert.schema_constraint(decoding.json_schema, field)
        case "regex":
            return constraints.regex(decoding.regex, field)
        case "choice":
            return constraints.choice(decoding.choice.choices, field)
        case "grammar":
            return constraints.grammar(decoding.grammar, field)
    return None


def infos_of(tokens: Iterable[TokenOut], order: Order) -> list[pb.TokenInfo]:
    """Returns the entries of a list of tokens, with the details that were asked for."""
    options, piece = order.options, order.card.tokenizer.piece
    infos = []
    for token in tokens:
        info = pb.TokenInfo(text=piece(token.id))
        if options.token_logprobs and token.logprob is not None:
            info.logprob = token.logprob
        if options.token_ranks:
            info.rank = token.rank
        for id_, _, logprob in token.top[: options.top_n_tokens]:
            info.top_tokens.add(text=piece(id_), logprob=logprob)
        infos.append(info)
    return infos


class Answer:
    """One answer on its way out: what has come since the last message, and how it ended."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._input_told = False
        self._tokens: list[TokenOut] = []
        self._text = ""
        self._count = 0
        self._finish: Finish | None = None
        self._expired = False

    def gather(self, chunk: Chunk) -> None:
        """Takes what came."""
        self._tokens += chunk.tokens
        self._count += len(chunk.tokens)
        self._text += chunk.text
        self._finish = chunk.finish

    def expire(self, error: RequestError) -> None:
        """The answer broke off. That is an end if its time was up, and raised anew if not."""
        if not self._order.timed or error.fault is not Fault.DEADLINE:
            raise error
        self._expired = True

    def message(self, scored: Sequence[TokenOut] = ()) -> pb.GenerationResponse:
        """Returns everything since the last message, and in the first one what the input is.

        ``scored`` are the input's tokens, if ``Order.scored``.
        """
        order, finish = self._order, self._finish
        message = pb.GenerationResponse(generated_token_count=self._count)
        if not self._input_told:
            self._tell_input(message, scored)
        message.text += self._text
        if order.options.generated_tokens:
            message.tokens.extend(infos_of(self._tokens, order))
        if self._expired:
            message.stop_reason = pb.TIME_LIMIT
        if finish is not None:
            message.stop_reason = _stop_reason(finish.reason, order)
            message.stop_sequence = finish.stop or ""
            message.seed = finish.seed or 0
        self._tokens, self._text = [], ""
        return message

    def _tell_input(self, message: pb.GenerationResponse, scored: Sequence[TokenOut]) -> None:
        order, piece = self._order, self._order.card.tokenizer.piece
        self._input_told = True
        message.input_token_count = len(order.ids)
        message.seed = order.ask.params.seed or 0
        if order.options.input_text:
            message.text = order.text
        if order.scored:
            message.input_tokens.extend(infos_of(scored, order))
        elif order.options.input_tokens:
            message.input_tokens.extend(pb.TokenInfo(text=piece(id_)) for id_ in order.ids)


def _stop_reason(reason: Reason, order: Order) -> pb.StopReason:
    match reason:
        case Reason.LENGTH:
            return pb.TOKEN_LIMIT if order.cut else pb.MAX_TOKENS
        case Reason.EOS:
            return pb.EOS_TOKEN
    return pb.STOP_SEQUENCE


def check_prefix(prefix: str) -> None:
    """Refuses soft prompts, which no engine has. Raises RequestError, UNSUPPORTED."""
    if prefix:
        text = "`prefix_id` is not supported: prompt tuning is not offered here"
        raise RequestError(Fault.UNSUPPORTED, text, "prefix_id")
