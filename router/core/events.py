"""What can happen, in the past tense. Events are complete: the core looks nothing up.

Token ids, token counts and milliseconds are plain integers throughout.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum

PROMPT_LOGPROBS = "prompt_logprobs"
"""The feature of a request whose prompt's log probabilities are wanted, too."""


class Reason(Enum):
    """Why a request ended. Each request ends exactly once, with exactly one of these."""

    EOS = "eos_token"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    STOP_STRING = "stop_sequence"
    CANCELLED = "cancelled"
    DEADLINE = "deadline_exceeded"
    OVERLOADED = "overloaded"
    TOO_LONG = "too_long"
    UNSUPPORTED = "unsupported"
    WORKER_LOST = "worker_lost"
    ENGINE_FAILED = "engine_failed"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one group can hold and do, as the smallest of its ranks says.

    ``donor_tokens_max`` is how many tokens of ended sequences are worth keeping; None: any number.
    """

    kv_tokens: int
    page_tokens: int
    sequences_max: int
    step_tokens_max: int
    length_max: int
    shares_prefix: bool
    donor_tokens_max: int | None = None


@dataclass(frozen=True, slots=True)
class GroupUp:
    """Every rank of a group is connected and empty. ``epoch`` is new for each such life.

    ``adapters`` are the LoRA adapters that its sequences may ask for, by name.
    """

    group: str
    epoch: int
    model: str
    engine: str
    limits: Limits
    features: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupDown:
    """A rank was lost, or answered something that cannot be trusted."""

    group: str
    epoch: int


@dataclass(frozen=True, slots=True)
class GroupLeaving:
    """A group is to go: it gets no more requests, and what runs there moves on.

    What no other group can take ends there; with ``at_once`` all of it waits in line instead. If it
    ``returns``, what only it can do may wait until it is up again.
    """

    group: str
    epoch: int
    at_once: bool = False
    returns: bool = False


@dataclass(frozen=True, slots=True)
class GroupGone:
    """A group that is down will not come up again, unless one of that name is added."""

    group: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """A sequence to produce. ``request`` is unique for ever.

    ``max_tokens`` is how many tokens may be generated, ``stop_tokens`` the ids that end it,
    ``needs`` the features it cannot do without. Smaller ``priority`` goes first. ``deadline_ms`` is
    the instant at which it must have ended, or None. ``sampling`` travels to the worker unread.
    ``adapter`` is the LoRA adapter that it is computed with; "" is the model itself.
    """

    request: int
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    needs: tuple[str, ...] = ()
    priority: int = 1
    deadline_ms: int | None = None
    sampling: object = None
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The request is over for its owner: the client left, or a stop string appeared."""

    request: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class StepDone:
    """A group has applied a plan.

    ``sequences``, ``tokens`` and ``logprobs`` run in parallel; ``logprobs`` may be empty, and is
    delivered unread. ``failures`` pairs a sequence with one line for a person. ``prompts`` has log
    probabilities of prompts: a sequence, the position of a token, at least 1, and what is to be
    delivered, unread, for that token and the ones behind it.
    """

    group: str
    epoch: int
    plan_id: int
    sequences: Seq[int]
    tokens: Seq[int]
    logprobs: Seq[object] = ()
    failures: tuple[tuple[int, str], ...] = ()
    prompts: tuple[tuple[int, int, Seq[object]], ...] = ()


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed; ``wake_at`` was reached."""


Event = GroupUp | GroupDown | GroupLeaving | GroupGone | Submitted | Ended | StepDone | Ticked
