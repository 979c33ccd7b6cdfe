"""A core on a bench: short words for what happens, so that examples read as tables."""

from router.core.effects import Close, Deliver, Effect, RunPlan
from router.core.events import (
    Ended,
    Event,
    GroupDown,
    GroupUp,
    Limits,
    Reason,
    StepDone,
    Submitted,
    Ticked,
)
from router.core.scheduler import Core
from router.core.snapshot import GroupSnapshot
from router.core.state import CoreConfig

END = 9
WIDE = Limits(
    kv_tokens=1000,
    page_tokens=1,
    sequences_max=16,
    step_tokens_max=100,
    length_max=1000,
    shares_prefix=True,
)


class Bench:
    """A core with a clock; ``plans`` are all that it has sent, oldest first."""

    def __init__(self, config: CoreConfig | None = None) -> None:
        self.core = Core(config or CoreConfig(share_tokens_min=2, reserve_tokens=0))
        self.now = 0
        self.plans: list[RunPlan] = []

    def observe(self, event: Event) -> list[Effect]:
        """Tells the core of an event, without letting it plan."""
        return self.core.observe(self.now, event)

    def plan(self) -> list[Effect]:
        """Lets the core plan, and checks that it then has nothing more to say."""
        effects = self.core.plan(self.now)
        assert self.core.plan(self.now) == []
        self.plans += [effect for effect in effects if isinstance(effect, RunPlan)]
        return effects

    def sent(self) -> list[RunPlan]:
        """The plans that the core sends now."""
        return [effect for effect in self.plan() if isinstance(effect, RunPlan)]

    def up(
        self,
        limits: Limits = WIDE,
        group: str = "g",
        epoch: int = 1,
        model: str = "m",
        features: tuple[str, ...] = (),
        adapters: tuple[str, ...] = (),
    ) -> None:
        """A group comes up."""
        up = GroupUp(group, epoch, model, "scripted", limits, features, adapters)
        assert self.observe(up) == []

    def down(self, group: str = "g", epoch: int = 1) -> list[Effect]:
        """A group is lost."""
        return self.observe(GroupDown(group, epoch))

    def submit(
        self,
        request: int,
        prompt: tuple[int, ...],
        max_tokens: int = 5,
        *,
        needs: tuple[str, ...] = (),
        priority: int = 1,
        deadline_ms: int | None = None,
        model: str = "m",
        adapter: str = "",
    ) -> list[Effect]:
        """A request arrives; ``END`` ends its answer."""
        stops = frozenset({END})
        submitted = Submitted(
            request, model, prompt, max_tokens, stops, needs, priority, deadline_ms, None, adapter
        )
        return self.observe(submitted)

    def end(self, request: int, reason: Reason = Reason.CANCELLED) -> list[Effect]:
        """The owner of a request ends it."""
        return self.observe(Ended(request, reason))

    def tick(self, now: int) -> list[Effect]:
        """Time passes, and the core plans."""
        self.now = now
        assert self.observe(Ticked()) == []
        return self.plan()

    def answer(
        self, plan: RunPlan, tokens: dict[int, int], failures: tuple[tuple[int, str], ...] = ()
    ) -> list[Effect]:
        """A group answers a plan."""
        return self.observe(
            StepDone(
                plan.group,
                plan.epoch,
                plan.plan_id,
                list(tokens),
                list(tokens.values()),
                failures=failures,
            )
        )

    def group(self, name: str = "g") -> GroupSnapshot:
        """The numbers of a group."""
        return next(shot for shot in self.core.snapshot().groups if shot.name == name)

    def finish(self, request: int, prompt: tuple[int, ...], adapter: str = "") -> None:
        """Runs a request with an answer of one token to its end. Nothing else may be in flight."""
        self.submit(request, prompt, max_tokens=1, adapter=adapter)
        plans = self.sent()
        for plan in plans[:-1]:
            assert self.answer(plan, {}) == []
        closed = self.answer(plans[-1], {request: END})
        assert closed[-1] == Close(request, Reason.EOS)
        for plan in self.sent():
            self.answer(plan, {})


def tokens_of(effects: list[Effect]) -> list[tuple[int, int]]:
    """The pairs of request and token that are delivered."""
    return [
        pair
        for effect in effects
        if isinstance(effect, Deliver)
        for pair in zip(effect.requests, effect.tokens, strict=True)
    ]


def endings_of(effects: list[Effect]) -> dict[int, Reason]:
    """Which requests are closed, and why."""
    return {effect.request: effect.reason for effect in effects if isinstance(effect, Close)}


def work_of(plan: RunPlan) -> dict[int, int]:
    """How many tokens of which sequence a plan computes."""
    return dict(zip(plan.work_sequences, plan.work_tokens, strict=True))
