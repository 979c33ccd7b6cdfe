"""What the checkers know of requests and groups, kept from events and effects alone."""

from collections import Counter, deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from router.core.effects import Close, RunPlan
from router.core.events import PROMPT_LOGPROBS, Limits, Reason, Submitted
from router.core.state import CoreConfig
from tests.sim.worker import Worker, digest_of, draw, ensure, follow
from tests.sim.world import GroupSpec

_HOPELESS = (Reason.UNSUPPORTED, Reason.TOO_LONG)


@dataclass(slots=True, eq=False)
class Request:
    """One request: its place in line, what it has received, and where it resides."""

    facts: Submitted
    model: int
    key: tuple[int, int]
    digest: int
    tokens: list[int] = field(default_factory=list)
    open: bool = True
    failed: bool = False
    asked: Reason | None = None
    stop_after: int | None = None
    losses: int = 0
    kept: int = 0
    scored: int = 1
    shared: int = 0
    home: "GroupBook | None" = None
    admitted_by: int = 0

    @property
    def id(self) -> int:
        """The request's number."""
        return self.facts.request

    @property
    def end(self) -> int:
        """Tokens that it may have in all."""
        return len(self.facts.prompt) + self.facts.max_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether it wants the log probabilities of its prompt."""
        return PROMPT_LOGPROBS in self.facts.needs

    def take_scores(self, values: Seq[object]) -> None:
        """Receives log probabilities of its prompt, which must be the next ones."""
        ensure(self.open, f"log probabilities for {self.id}, which is closed")
        ensure(self.scores_prompt and values, f"{self.id} wants no log probabilities")
        for value in values:
            ensure(value == ("score", self.id, self.scored), "log probabilities of another token")
            self.scored += 1

    def take(self, token: int) -> Reason | None:
        """Receives a token, which must be the right one; says why this was the last, if so."""
        ensure(self.open, f"a token for {self.id}, which is closed")
        ensure(token == draw(self.digest), f"{self.id} received a wrong token")
        scored = self.scored == len(self.facts.prompt) or not self.scores_prompt
        ensure(scored, f"{self.id} received a token before all log probabilities of its prompt")
        self.digest = follow(self.digest, token)
        self.tokens.append(token)
        ensure(len(self.tokens) <= self.facts.max_tokens, f"{self.id} received too many tokens")
        if token in self.facts.stop_tokens:
            return Reason.EOS
        return Reason.LENGTH if len(self.tokens) == self.facts.max_tokens else None


@dataclass(slots=True, eq=False)
class GroupBook:
    """One life of a group: the worker as it will be once all sent plans are applied."""

    name: str
    model: int
    limits: Limits
    features: tuple[str, ...]
    adapters: tuple[str, ...]
    worker: Worker
    kv_capacity: int
    step_tokens: int
    batch: int
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    answered_ms: int = 0
    plan: RunPlan | None = None
    budget_left: int = 0
    idle_plans: dict[int, int] = field(default_factory=dict)
    robbed: bool = False
    leaving: bool = False
    returns: bool = True

    def due_ms(self, config: CoreConfig) -> int | None:
        """When the answer to the oldest plan in flight is due, if there is one."""
        if not self.in_flight:
            return None
        return max(self.in_flight[0][1], self.answered_ms) + config.step_deadline_ms

    def able(self, request: Request) -> bool:
        """Whether the empty group could run the request to its end."""
        page = self.limits.page_tokens
        return (
            request.end <= self.limits.length_max
            and -(-request.end // page) * page <= self.kv_capacity
            and not set(request.facts.needs) - set(self.features)
            and self.has_adapter(request)
        )

    def has_adapter(self, request: Request) -> bool:
        """Whether it has what the request is to be computed with."""
        return request.facts.adapter in ("", *self.adapters)


def group_book(spec: GroupSpec, limits: Limits, epoch: int, config: CoreConfig) -> GroupBook:
    """The book of a new life; what is smaller counts, the group's limits or the router's."""
    kv_tokens = min(limits.kv_tokens, config.kv_tokens_max or limits.kv_tokens)
    step_tokens = min(limits.step_tokens_max, config.step_tokens_max or limits.step_tokens_max)
    batch = min(limits.sequences_max, config.sequences_max or limits.sequences_max, step_tokens)
    return GroupBook(
        spec.name,
        spec.model,
        limits,
        spec.features,
        spec.adapters,
        Worker(epoch, limits, kv_tokens, spec.model + 1, spec.adapters, spec.late),
        kv_tokens // limits.page_tokens * limits.page_tokens,
        step_tokens,
        batch,
    )


class Books:
    """All requests and all live groups.

    ``due`` are the endings that this call must bring; ``waits`` says for whom a request waited.
    """

    def __init__(self, config: CoreConfig, seen: Counter[str]) -> None:
        self.config = config
        self.seen = seen
        self.requests: dict[int, Request] = {}
        self.open: dict[int, Request] = {}
        self.groups: dict[str, GroupBook] = {}
        self.away: dict[str, tuple[int, GroupBook]] = {}
        self.due: dict[int, Reason] = {}
        self.waits: dict[int, int] = {}
        self.stranded: dict[int, int] = {}
        self.aside: set[int] = set()
        self.moved = self.admitted_tokens = self.shared_tokens = 0
        self.now = 0

    # --- requests

    def submitted(self, facts: Submitted, model: int) -> Request:
        """Opens a request, before the core is told of it."""
        arrived = self.now + facts.priority * self.config.head_start_ms
        key = (arrived, len(self.requests))
        digest = digest_of(model + 1, facts.adapter, facts.prompt)
        request = Request(facts, model, key, digest)
        self.requests[request.id] = self.open[request.id] = request
        return request

    def delivered(self, number: int, token: int) -> Request:
        """A token has come."""
        request = self.requests[number]
        last = request.take(token)
        if last is not None:
            self.due[number] = last
        return request

    def closed(self, close: Close) -> Request:
        """A request has been closed, for a reason that must be true."""
        request = self.requests[close.request]
        ensure(request.open, f"{request.id} is closed twice")
        due = self.due.pop(close.request, None)
        if due is None:
            self._check_refusal(request, close)
        else:
            ensure(due is close.reason, f"{request.id} should end with {due}, not {close.reason}")
        request.open = False
        request.failed = close.reason is Reason.ENGINE_FAILED
        del self.open[request.id]
        self.seen["hope is over"] += request.id in self.aside and close.reason in _HOPELESS
        self.aside.discard(request.id)
        self.seen[f"close {close.reason.value}"] += 1
        return request

    def _check_refusal(self, request: Request, close: Close) -> None:
        groups = self.serving(request.model)
        able = any(group.able(request) for group in groups)
        hopeless = self.hopeless(request) and not request.tokens
        having = [group for group in groups if group.has_adapter(request)]
        lacking = any(set(request.facts.needs) - set(group.features) for group in having)
        lacking = lacking or not having
        match close.reason:
            case Reason.OVERLOADED:
                true = len(self.open) - 1 >= self.config.requests_max or (
                    self.waits_aside(request) and self.crowded_aside()
                )
            case Reason.UNSUPPORTED:
                true = hopeless and lacking
            case Reason.TOO_LONG:
                true = hopeless and not lacking
            case Reason.WORKER_LOST:  # set aside in this turn, behind a group that is of no use
                since = self.stranded.get(request.id, self.now)
                late = since + self.config.resume_timeout_ms <= self.now
                true = late and bool(groups) and not able
            case _:
                true = False
        ensure(true, f"{request.id} ended with {close.reason}, which is not so")
        ensure(close.detail, "a refusal without a word of why")

    def serving(self, model: int) -> list[GroupBook]:
        """The live groups in which a request of a model may be placed."""
        return [
            group for group in self.groups.values() if group.model == model and not group.leaving
        ]

    def expected(self, model: int) -> list[GroupBook]:
        """Groups that are not to be had now, and are likely to come up again."""
        leaving = [one for one in self.groups.values() if one.leaving and one.returns]
        away = [group for _, group in self.away.values()]
        return [group for group in (*leaving, *away) if group.model == model]

    def waits_aside(self, request: Request) -> bool:
        """Whether there are groups, none of which could run the request."""
        groups = self.serving(request.model)
        return bool(groups) and not any(group.able(request) for group in groups)

    def hopeless(self, request: Request) -> bool:
        """Whether no group that is expected could, either."""
        expected = self.expected(request.model)
        return self.waits_aside(request) and not any(group.able(request) for group in expected)

    def crowded_aside(self) -> bool:
        """Whether those who wait for a group that is away have half of all places."""
        return len(self.aside) * 2 >= self.config.requests_max

    def resident(self, group: GroupBook, plan_id: int) -> dict[int, Request]:
        """The open requests that were resident in a group when it got this plan."""
        return {
            request.id: request
            for request in self.open.values()
            if request.home is group and request.admitted_by <= plan_id
        }

    # --- groups

    def lost(self, group: GroupBook) -> None:
        """A life of a group is over; what must become of those who were resident there."""
        self.went(group)
        for request in list(self.open.values()):
            if request.home is not group:
                continue
            request.home = None
            if request.id in self.due:
                continue
            gained, request.kept = len(request.tokens) - request.kept, len(request.tokens)
            if gained >= self.config.progress_tokens_min:
                self.seen["loss after progress"] += request.losses > 0
                request.losses = 0
            request.losses += 1
            broken = bool(request.tokens) and not self.config.resume_streams
            if broken or request.losses >= self.config.attempts_max:
                self.due[request.id] = Reason.WORKER_LOST
            else:
                self.seen["resume" if request.tokens else "retry"] += 1

    def went(self, group: GroupBook) -> None:
        """A group is not up any more."""
        del self.groups[group.name]
        if group.returns:
            self.away[group.name] = self.now + self.config.resume_timeout_ms, group

    def moved_on(self, request: Request, elsewhere: bool) -> None:
        """It has left the group where it was resident, for another one or for the line."""
        group = request.home
        ensure(group is not None and group.leaving, f"{request.id} moves out of a group that stays")
        ensure(not request.tokens or self.config.resume_streams, f"{request.id} may not move")
        self.seen["moved" if elsewhere else "turned out"] += 1
        self.seen["moved in mid-answer"] += bool(request.tokens)
        self.moved += 1
        request.home = None

    def expect(self) -> None:
        """The beginning of a turn: whose time is over has to end in it."""
        self.away = {name: pair for name, pair in self.away.items() if pair[0] > self.now}
        for request in self.open.values():
            deadline = request.facts.deadline_ms
            if deadline is not None and deadline <= self.now:
                self.due[request.id] = Reason.DEADLINE
        for number, since in self.stranded.items():
            if number not in self.open or since + self.config.resume_timeout_ms > self.now:
                continue
            groups = self.serving(self.open[number].model)
            if not groups or (number in self.aside and not self._able(number, groups)):
                self.seen["given up"] += number not in self.due
                self.due.setdefault(number, Reason.WORKER_LOST)

    def _able(self, number: int, groups: list[GroupBook]) -> bool:
        return any(group.able(self.open[number]) for group in groups)

    def settle(self) -> None:
        """The end of a call: all that was due has come."""
        ensure(not self.due, f"these should have ended: {self.due}")
