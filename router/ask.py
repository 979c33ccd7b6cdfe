"""What a client asks for and what it gets, the same for every protocol.

The API faces translate their bodies into an ``Ask`` and their answers from ``Chunk``; the service
knows nothing else of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from router.core.events import Reason


class ConstraintKind(Enum):
    """The dialects in which a constraint can be written; see ``shards.v1.Constraint``."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the generated text must match as a whole.

    ``text`` is a JSON schema as JSON text, a regular expression, or a grammar in llguidance's Lark.
    ``field`` is the client's parameter that asked for it, which errors name. ``parts`` are what the
    client asked for, where the text was made of several such: one of them cannot be compiled if the
    whole cannot.
    """

    kind: ConstraintKind
    text: str
    field: str = "grammar"
    parts: tuple["Constraint", ...] = ()


@dataclass(frozen=True, slots=True)
class Params:
    """How to draw tokens and when to end. Neutral values are explicit: 1.0, 0.0 or 0 is off.

    ``max_tokens`` None means: as many as fit. ``temperature`` 0 is greedy. ``seed`` None means:
    drawn by the service. ``logprobs`` asks for the raw natural log of each token's probability,
    ``top_logprobs`` for this many of the likeliest beside it; ``prompt_logprobs`` asks for both of
    the prompt's tokens, too, and ``ranks`` for the place of each of these tokens among all.
    ``constraint`` is what the answer must match. ``kept_tokens`` are the special tokens that are
    text all the same when others are skipped. ``watermark`` marks the answer, as the settings say.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    skip_special_tokens: bool = True
    kept_tokens: frozenset[int] = frozenset()
    ranks: bool = False
    watermark: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation. ``model`` None means the default model; a name may be an adapter's, too.

    ``prompt`` is text or token ids; ``truncate`` keeps its last tokens only. ``deadline_s`` is how
    long the whole answer may take, or None. ``adapter`` is the LoRA adapter to compute with; "" is
    the one that ``model`` names, if any.
    """

    prompt: str | tuple[int, ...]
    params: Params = field(default_factory=Params)
    model: str | None = None
    add_special_tokens: bool = True
    truncate: int | None = None
    priority: int = 1
    deadline_s: float | None = None
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class EmbedAsk:
    """Inputs to embed, each text or token ids; the other fields as in ``Ask``."""

    inputs: tuple[str | tuple[int, ...], ...]
    model: str | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """A vector of length 1 for each input, and the tokens of all inputs together."""

    vectors: list[Sequence[float]]
    prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class TokenOut:
    """A generated token. ``text`` is what it adds to the answer when special tokens are shown.

    A token that ends inside a character has the empty text, and the next one carries the whole.
    ``rank`` is how many tokens were likelier, plus 1; 0 if it was not asked for.
    """

    id: int
    text: str
    special: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended. ``text`` is the whole answer: the concatenation of all chunk texts.

    ``seed`` is None when greedy; ``stop`` is the stop string that appeared, or None. ``prompt`` are
    the prompt's tokens if their log probabilities were asked for; the first one has none.
    ``queued_ms`` is how long the request waited for its place, and no part of what was answered.
    """

    reason: Reason
    text: str
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0
    seed: int | None = None
    stop: str | None = None
    prompt: tuple[TokenOut, ...] = ()
    queued_ms: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came since the last chunk: tokens, the text that became final, perhaps the end.

    Text held back because a stop string may be starting comes with a later chunk, so ``text`` is
    not always the tokens' texts joined.
    """

    tokens: tuple[TokenOut, ...]
    text: str
    finish: Finish | None = None
