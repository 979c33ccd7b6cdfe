"""What the core remembers: one ``Sequence`` per request, one ``Group`` per live group.

Only the modules of this folder touch these, and only from within one call of the core.
"""

from collections import deque
from dataclasses import dataclass, field

from router.core.events import PROMPT_LOGPROBS, GroupUp, Submitted
from router.core.ledger import Account, Ledger
from router.core.prefix import PrefixTree


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Limits and choices of the core. None leaves a limit to the group.

    ``requests_max`` bounds waiting and running requests together. ``reserve_tokens`` is how far
    ahead of its tokens a running sequence reserves memory. ``share_tokens_min`` is the shortest
    prefix worth sharing. ``head_start_ms`` is how much earlier a request of the next more urgent
    priority counts as having arrived, so that no priority starves. ``resume_timeout_ms`` is for how
    long an answer that has begun waits while no group is up in which it could go on.
    ``attempts_max`` bounds the losses of a request in a row: one behind which it has gained
    ``progress_tokens_min`` tokens counts as the first again. One token shows nothing, as a prompt
    may draw it and the decode that follows end the worker each time.
    """

    requests_max: int = 128
    step_tokens_max: int | None = None
    kv_tokens_max: int | None = None
    sequences_max: int | None = None
    plans_in_flight_max: int = 2
    step_deadline_ms: int = 60_000
    attempts_max: int = 3
    progress_tokens_min: int = 16
    resume_streams: bool = True
    resume_timeout_ms: int = 300_000
    reserve_tokens: int = 256
    share_tokens_min: int = 16
    head_start_ms: int = 10_000


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way: waiting, placed in a group, or (as a donor) finished but resident.

    ``scheduled`` tokens are computed by the plans sent so far. Until they draw the first token of
    this life, what is left is ``len(tokens) - scheduled``, whether that is a prompt or everything
    after a loss; from then on each plan computes one more, which need not be known here yet.
    Production ends at ``end`` tokens, prompt included. ``account`` is what it holds of its group's
    memory, and ``admitted_by`` the plan that made it resident there, 0 before. ``losses`` counts
    those in a row, at the last of which it had ``lost_len`` tokens. ``scored`` tokens of the prompt
    are done with, if its log probabilities are wanted: they have been delivered, but for the first,
    which nothing predicts.
    """

    facts: Submitted
    key: tuple[int, int]
    tokens: list[int]
    end: int
    group: "Group | None" = None
    admitted_by: int = 0
    scheduled: int = 0
    account: Account | None = None
    losses: int = 0
    lost_len: int = 0
    scored: int = 1

    @property
    def id(self) -> int:
        """The request's number, which is also the sequence's on the wire."""
        return self.facts.request

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.facts.prompt)

    @property
    def produced(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.facts.prompt)

    @property
    def admitted(self) -> bool:
        """Whether a plan has made it resident on the workers."""
        return self.admitted_by > 0

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are wanted."""
        return PROMPT_LOGPROBS in self.facts.needs

    def lose(self, progress_tokens_min: int) -> None:
        """Counts the loss of its worker; the first in a row if it has got on since the last."""
        if len(self.tokens) - self.lost_len >= progress_tokens_min:
            self.losses = 0
        self.losses += 1
        self.lost_len = len(self.tokens)

    def leave(self) -> None:
        """Forgets its life in a group; the tokens stay."""
        self.group = self.account = None
        self.admitted_by = self.scheduled = 0


@dataclass(frozen=True, slots=True)
class InFlight:
    """A plan that has been sent and not answered; each of ``samples`` must draw a token.

    Each of ``scored`` must have told the log probabilities of its whole prompt by then.
    """

    plan_id: int
    sent_ms: int
    samples: dict[int, None]
    scored: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Group:
    """One life of a group: from ``GroupUp`` until it is lost.

    ``filling`` and ``decoding`` hold the placed sequences, in order of placement, before and after
    the plan that draws their first token of this life. ``donors`` hold finished ones, the one used
    least recently first. ``drops`` wait for the next plan. ``answered_ms`` is when the latest
    outcome came: only then does the group begin with the plan after it. While ``leaving`` it gets
    no more requests; ``left`` says that its last one is known to be gone. One that ``returns`` is
    likely to come up again.
    """

    up: GroupUp
    ledger: Ledger
    tree: PrefixTree
    batch_max: int
    step_tokens_max: int
    filling: dict[int, Sequence] = field(default_factory=dict)
    decoding: dict[int, Sequence] = field(default_factory=dict)
    donors: dict[int, Sequence] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)
    in_flight: deque[InFlight] = field(default_factory=deque)
    plans: int = 0
    answered_ms: int = 0
    leaving: bool = False
    left: bool = False
    returns: bool = True

    @property
    def running(self) -> int:
        """Sequences that hold memory and still produce tokens."""
        return len(self.filling) + len(self.decoding)

    @property
    def resident(self) -> int:
        """Sequences that occupy a place on the workers, or are about to."""
        return self.running + len(self.donors)

    def answer_due_ms(self, config: CoreConfig) -> int:
        """When the answer to the oldest plan in flight is due. There is one."""
        return max(self.in_flight[0].sent_ms, self.answered_ms) + config.step_deadline_ms

    def members(self) -> list["Sequence"]:
        """All that hold memory."""
        return [*self.decoding.values(), *self.filling.values(), *self.donors.values()]

    def placed(self, request: int) -> Sequence | None:
        """The running sequence of this number, if it is here."""
        return self.decoding.get(request) or self.filling.get(request)

    def holder(self, request: int) -> Sequence:
        """The resident sequence of this number, running or donor."""
        sequence = self.placed(request) or self.donors.get(request)
        assert sequence is not None
        return sequence


def new_group(up: GroupUp, config: CoreConfig) -> Group:
    """A group that has just come up: of its limits and the router's, the smaller ones count."""
    limits = up.limits
    kv_tokens = min(limits.kv_tokens, config.kv_tokens_max or limits.kv_tokens)
    step_tokens = min(limits.step_tokens_max, config.step_tokens_max or limits.step_tokens_max)
    # Every running sequence can then decode in every step: none has to take turns.
    batch = min(limits.sequences_max, step_tokens, config.sequences_max or step_tokens)
    return Group(up, Ledger(kv_tokens, limits.page_tokens), PrefixTree(), batch, step_tokens)
