"""The contract between a shard worker and the engine that it hosts.

All methods are called from one thread, one at a time. An engine knows no requests, no text and no
clock. It keeps, for each resident sequence, the known tokens and how many of them are computed; the
log of plans is the only thing that changes this.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.grammar import Grammar


class Scheduling(Enum):
    """Who picks the tokens of a step; see ``shards.v1.SchedulingKind``."""

    CALLER = "caller"
    STEPPED = "stepped"
    SELF = "self"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine is and what it can hold; counts are in tokens or sequences.

    ``donor_tokens_max`` as in ``shards.v1.DescribeResponse``; 0 is no limit. ``adapters`` are the
    names of the LoRA adapters that sequences may ask for. ``embed_tokens_max`` bounds what is
    embedded at once, 0 without the feature "embeddings".
    """

    engine: str
    engine_version: str
    device: str
    model_id: str
    dtype: str
    scheduling: Scheduling
    kv_tokens: int
    page_tokens: int
    sequences_max: int
    step_tokens_max: int
    length_max: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    features: tuple[str, ...]
    rank: int = 0
    world: int = 1
    weight_bytes: int = 0
    warnings: tuple[str, ...] = ()
    donor_tokens_max: int = 0
    adapters: tuple[str, ...] = ()
    embed_tokens_max: int = 0


class ConstraintKind(Enum):
    """The dialects in which a constraint can be written; see ``shards.v1.Constraint``."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the generated text must match."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Watermark:
    """How text is marked; see ``shards.watermark``. ``gamma`` is in (0, 1), ``key`` has 64 bits."""

    gamma: float
    delta: float
    key: int


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the next token; units and meaning as in ``shards.v1.Sampling``.

    Here every neutral value is explicit: a penalty or probability that is off is 1.0, ``top_k`` 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_tokens: tuple[int, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    constraint: Constraint | None = None
    prompt_logprobs: bool = False
    ranks: bool = False
    watermark: Watermark | None = None


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence that becomes resident, perhaps as a copy of the start of another one.

    ``adapter`` is the name of a LoRA adapter of ``EngineInfo.adapters``; empty: the model itself.
    """

    sequence: int
    tokens: Sequence[int]
    prompt_len: int
    sampling: SamplingParams
    share_from: int = 0
    share_len: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: drops first, then admits, then the work, pairs of sequence and token count."""

    drops: Sequence[int] = ()
    admits: Sequence[Admit] = ()
    work: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Raw natural-log probabilities at one position, before any warping.

    ``rank`` is how many tokens are likelier than the drawn one, plus 1; 0 if it was not asked for.
    """

    logprob: float
    top_tokens: Sequence[int] = ()
    top_values: Sequence[float] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Raw natural-log probabilities of prompt tokens from the position ``start``, at least 1, on.

    ``likeliest`` is parallel to ``logprobs``, or empty if no likely tokens were asked for: pairs of
    token and value, most likely first. ``ranks`` are as ``Logprobs.rank``, likewise.
    """

    start: int
    logprobs: Sequence[float]
    likeliest: Sequence[Sequence[tuple[int, float]]] = ()
    ranks: Sequence[int] = ()


@dataclass(slots=True)
class Outcome:
    """What a step drew: parallel lists, and the logprobs of the sequences that asked for them.

    ``failures`` names sequences that the engine cannot go on with, and why, in one line.
    ``prompt_logprobs`` has what was computed in this step of the prompts that asked.
    """

    sequences: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)


class PlanError(Exception):
    """The plan breaks the contract (unknown sequence, over budget). Nothing of it was applied."""


def undeclared(sampling: SamplingParams, features: Sequence[str]) -> str:
    """The first feature that a sequence needs and that is not among these; "" if there is none.

    A seed is no need: every sequence has one.
    """
    penalties = (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )
    needs = {
        "penalties": penalties,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "logit_bias": bool(sampling.logit_bias),
        "min_tokens": sampling.min_tokens > 0,
        "typical_p": sampling.typical_p < 1.0 and sampling.temperature > 0.0,
        "grammar": sampling.constraint is not None,
        "ranks": sampling.ranks,
        "watermark": sampling.watermark is not None,
    }
    return next((need for need, needed in needs.items() if needed and need not in features), "")


def check_scoring(plan: Plan, info: EngineInfo) -> None:
    """Raises ``PlanError`` if a prompt is to be scored by an engine that does not.

    It would be computed like any other, and nobody would be told anything of it.
    """
    if "prompt_logprobs" in info.features:
        return
    for admit in plan.admits:
        if admit.sampling.prompt_logprobs:
            raise PlanError(
                f"sequence {admit.sequence}: {info.engine} does not support prompt_logprobs"
            )


class FeatureError(Exception):
    """The engine does not have the feature that a call needs; the text names both, in one line."""


class EngineLost(Exception):
    """The device or the engine's state cannot be trusted any more; the worker ends its stream."""


class ModelError(Exception):
    """The model cannot be loaded. The text is one line that names the file and the reason."""


Vectors = Sequence[Sequence[float]]
"""One vector of length 1 for each input, all with as many values."""

Progress = Callable[[float], None]
"""Called while loading with the fraction done, 0 to 1."""


class Started(ABC):
    """A step that was started, and may still be under way on the device."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether ``finish`` would not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Waits for the device, and changes nothing. The one method for any thread."""

    @abstractmethod
    def finish(self) -> Outcome:
        """Waits for the device, and says what came of the step. Called once.

        Raises ``EngineLost`` when nothing can be trusted.
        """


@dataclass(frozen=True, slots=True)
class Finished(Started):
    """A step that nobody need wait for."""

    outcome: Outcome

    @property
    def done(self) -> bool:
        """See ``Started``."""
        return True

    def wait(self) -> None:
        """See ``Started``."""

    def finish(self) -> Outcome:
        """See ``Started``."""
        return self.outcome


STARTED_MAX = 2
"""Steps of one engine that may be started and not finished."""


class Engine(ABC):
    """One engine on one device. Made loaded: a constructor that returns is ready to serve."""

    @abstractmethod
    def describe(self) -> EngineInfo:
        """Says what the engine is. Constant over its life."""

    @abstractmethod
    def step(self, plan: Plan) -> Outcome:
        """Applies a plan and computes its work.

        A sequence whose known tokens have then all been computed draws one more, which becomes
        known. Raises ``PlanError`` before touching anything, ``EngineLost`` when nothing can be
        trusted; a fault of one sequence is reported in the outcome.
        """

    def start(self, plan: Plan) -> Started:
        """Does what ``step`` does, but does not wait for the device, where the engine can.

        The next step may then be started before this one is finished, so that the device never
        waits for the host: a token that is still being drawn goes into it on the device. Steps are
        finished in the order of their starts, and before anything else is asked of the engine;
        there are never more than ``STARTED_MAX``. Raises as ``step``.
        """
        return Finished(self.step(plan))

    @abstractmethod
    def reset(self) -> None:
        """Forgets every sequence: a new epoch begins."""

    def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        """Turns inputs, at most ``embed_tokens_max`` tokens in all, into vectors.

        Called between two steps, and leaves the sequences as they are. Raises ``FeatureError`` if
        the engine cannot, ``EngineLost`` when nothing can be trusted any more.
        """
        raise FeatureError(f"engine {self.describe().engine} does not support embeddings")

    def embedding(self, inputs: Sequence[Sequence[int]]) -> Iterator[Vectors | None]:
        """Does what ``embed`` does in turns, between which there may be steps.

        Each yields None, the last one the vectors. One that is not run to its end was given up.
        Raises as ``embed`` does.
        """
        yield self.embed(inputs)

    def guide_with(self, grammar: "Grammar") -> None:
        """Gives the engine what compiles constraints, before its first step.

        Called if it has the feature "grammar". One that was given none makes its own when it first
        meets a constraint.
        """

    @abstractmethod
    def tokenizer_files(self) -> dict[str, bytes]:
        """The model's ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""

    def close(self) -> None:
        """Frees the device. Called once."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the worker's command line says to every engine. 0 or "" means: the engine chooses.

    ``rendezvous`` is HOST:PORT, where the ranks of a group find each other; rank 0 listens there.
    It is new for each life of a group. ``device`` and ``dtype`` are the engine's own words, such as
    "cuda:1" and "bfloat16". ``adapters`` pairs each LoRA adapter's name with its folder or file.
    """

    model: Path | None
    model_id: str
    kv_tokens: int = 0
    sequences_max: int = 0
    step_tokens_max: int = 0
    threads: int = 0
    rank: int = 0
    world: int = 1
    rendezvous: str = ""
    device: str = ""
    dtype: str = ""
    adapters: tuple[tuple[str, Path], ...] = ()
    extra: tuple[tuple[str, str], ...] = ()
