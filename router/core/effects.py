"""What the core asks for, in the imperative. The driver performs each and answers with events."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from router.core.events import Reason


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence that becomes resident; see ``shards.v1.Admit``, whose fields these are."""

    sequence: int
    tokens: tuple[int, ...]
    prompt_len: int
    share_from: int
    share_len: int
    sampling: object
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Write this plan to every rank of the group. Drops apply first, then admits, then the step.

    ``work_sequences`` and ``work_tokens`` run in parallel.
    """

    group: str
    epoch: int
    plan_id: int
    drops: tuple[int, ...]
    admits: tuple[Admit, ...]
    work_sequences: tuple[int, ...]
    work_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand these tokens to their requests. The lists run in parallel; ``logprobs`` may be empty.

    ``prompts`` goes first: a request, and the log probabilities of the next tokens of its prompt.
    """

    requests: list[int]
    tokens: list[int]
    logprobs: list[object]
    prompts: Seq[tuple[int, Seq[object]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Close:
    """The request has ended. ``detail`` is one line for a person, empty for ordinary endings."""

    request: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The group has not answered a plan in time, or not truthfully: end its streams, start anew."""

    group: str
    epoch: int
    detail: str


@dataclass(frozen=True, slots=True)
class Left:
    """A group that was to go has nothing left to do: end its streams."""

    group: str
    epoch: int


Effect = RunPlan | Deliver | Close | Abandon | Left
