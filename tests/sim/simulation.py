"""One simulated world: a clock, clients, workers and faults around one core.

The clock is a heap of ``(time, tie, handler, arguments)``. As the driver does, a turn lets the core
observe everything that happens at one instant, then plan once, then performs what it asked for.
Faults stop at some time; then everything must end, for no event is left but what the core caused.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection
from random import Random
from zlib import crc32

from router.core.effects import Abandon, Close, Deliver, Effect, Left, RunPlan
from router.core.events import (
    Event,
    GroupDown,
    GroupUp,
    Reason,
    StepDone,
    Ticked,
)
from router.core.scheduler import Core
from tests.sim.books import Books, GroupBook, group_book
from tests.sim.checks import check_end, check_kept, check_plan, check_turn
from tests.sim.choosing import check_choice
from tests.sim.clients import Clients
from tests.sim.donors import Scarce, check_donors
from tests.sim.leaving import Leaving, check_leaving, note_moves
from tests.sim.sharing import count_shares
from tests.sim.stranded import add_patience, note_stranded
from tests.sim.turn import Turn
from tests.sim.untrue import untrue
from tests.sim.worker import ensure
from tests.sim.world import GroupSpec, World, draw_limits, draw_world

TURNS_MAX = 4000


class Simulation:
    """Runs the world of one seed; raises ``Violation`` if the core does wrong."""

    def __init__(self, seed: int, core_type: type[Core] = Core, keep: int | None = 50) -> None:
        self.rng = Random(seed)
        self.world: World = draw_world(self.rng)
        self.leaving = Leaving(self, Random(f"leaving {seed}"))
        self.clients = Clients(self, seed)
        add_patience(Random(f"patience {seed}"), self.world)
        self.core = core_type(self.world.config)
        self.seen: Counter[str] = Counter()
        self.books = Books(self.world.config, self.seen)
        self.trace: deque[tuple[int, object]] = deque(maxlen=keep)
        self.digest = 0
        self.events = 0
        self.faults_on = True
        self._heap: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self._tie = 0
        self._timer: int | None = None
        self._epochs: Counter[str] = Counter()
        self._busy_until: Counter[str] = Counter()
        self._wedged: set[str] = set()
        self._last: dict[str, StepDone] = {}

    def run(self) -> None:
        """From the first event to the last."""
        self._schedule()
        turns = 0
        while self._heap:
            self.books.now = self._heap[0][0]
            while self._heap and self._heap[0][0] == self.books.now:
                _, _, handler, arguments = heapq.heappop(self._heap)
                handler(*arguments)
            self._turn()
            turns += 1
            ensure(turns < TURNS_MAX, "the world does not come to an end")
        check_end(self.books, self.core)

    # --- the clock

    def at(self, delay_ms: int, handler: Callable[..., None], *arguments: object) -> None:
        self._tie += 1
        heapq.heappush(self._heap, (self.books.now + delay_ms, self._tie, handler, arguments))

    def _schedule(self) -> None:
        rng, world = self.rng, self.world
        for spec in world.groups:
            self.at(0 if rng.random() < 0.6 else rng.randrange(60), self._up, spec)
            while rng.random() < world.faults.crash_per_group / 4:
                self.at(rng.randrange(world.spread_ms + 300), self._crash, spec)
        self.leaving.schedule()
        for _ in range(world.requests):
            burst = rng.random() < 0.3
            self.at(0 if burst else rng.randrange(world.spread_ms), self.clients.submit, None)
        self.at(world.spread_ms + 400, self._stop_faults)

    def _stop_faults(self) -> None:
        self.faults_on = False

    def happens(self, rate: float) -> bool:
        return rate > 0 and self.faults_on and self.rng.random() < rate

    def _turn(self) -> None:
        """Plans once, performs, and checks everything."""
        books, core, now = self.books, self.core, self.books.now
        before = Turn(core)
        books.expect()
        for group in books.groups.values():
            group.plan, group.robbed = None, False
        late = {
            name
            for name, group in books.groups.items()
            if (due := group.due_ms(books.config)) is not None and due <= now
        }
        preemptions = self.seen["preemption"]
        effects = core.plan(now)
        ensure(core.plan(now) == [], "plan, called again at once, returns something")
        note_moves(books, core, effects, core.counters.preempted > before.preempted)
        self.perform(effects, late, turn=True)
        check_leaving(books, core, before, effects)
        note_stranded(books, core)
        check_turn(books, core, before)
        check_choice(books, core, before)
        check_donors(books, core, before, preemptions)
        wake = core.wake_at()
        if wake is not None and (self._timer is None or self._timer <= now or wake < self._timer):
            self._timer = wake
            self.at(wake - now + self.rng.choice((0, 0, 0, 3)), self._tick)

    def _tick(self) -> None:
        ensure(self.observe(Ticked()) == [], "a tick has effects")

    def observe(self, event: Event) -> list[Effect]:
        """Lets the core observe an event, which is all that happens in between two checks."""
        self.events += 1
        self.trace.append((self.books.now, event))
        scarce = Scarce(self.core)
        effects = self.core.observe(self.books.now, event)
        scarce.check(effects)
        for effect in effects:
            if isinstance(effect, Close):
                check_kept(self.books, self.core, effect)
        return effects

    # --- what the core asks for

    def perform(
        self, effects: list[Effect], doubted: Collection[str] = (), turn: bool = False
    ) -> None:
        """Performs effects; exactly the ``doubted`` groups may, and must, be abandoned."""
        doubted = set(doubted)
        for effect in effects:
            self.trace.append((self.books.now, effect))
            match effect:
                case RunPlan():
                    self._run_plan(effect)
                case Deliver():
                    self._deliver(effect)
                case Close():
                    self._closed(effect)
                case Abandon():
                    self.seen["abandoned late" if turn else "abandoned untrue"] += 1
                    ensure(effect.group in doubted, f"{effect.group} is abandoned: {effect.detail}")
                    doubted.discard(effect.group)
                    self._abandoned(effect)
                case Left():
                    self.leaving.left(effect)
        ensure(not doubted, f"these should have been abandoned: {doubted}")
        self.books.settle()

    def _note(self, *numbers: object) -> None:
        self.digest = crc32(repr(numbers).encode(), self.digest)

    def _run_plan(self, plan: RunPlan) -> None:
        group = self.books.groups[plan.group]
        self._note(plan.group, plan.plan_id, plan.drops, plan.work_sequences, plan.work_tokens)
        check_plan(self.books, group, plan)
        count_shares(self.books, plan)
        heirs = group.worker.heirs
        drawn = group.worker.apply(plan, lambda: self.happens(self.world.faults.failure_per_token))
        self.seen["heir"] += group.worker.heirs - heirs
        self.seen["failure"] += len(drawn.failures)
        self.seen["failure by share"] += any("share" in why for _, why in drawn.failures)
        for number in plan.drops:
            if self.books.requests[number].home is group:  # it may have moved on
                self.books.requests[number].home = None
        for admit in plan.admits:
            request = self.books.requests[admit.sequence]
            full = (*request.facts.prompt, *request.tokens)
            ensure(admit.tokens == full, "an admit with other tokens than the request has")
            ensure(admit.prompt_len == len(request.facts.prompt), "prompt_len is wrong")
            ensure(admit.sampling is request.facts.sampling, "sampling is not passed on")
            ensure(admit.adapter == request.facts.adapter, "the adapter is not passed on")
            self.seen["adapter elsewhere"] += bool(admit.adapter) and not all(
                other.has_adapter(request) for other in self.books.serving(request.model)
            )
            request.home, request.admitted_by = group, plan.plan_id
            request.shared = admit.share_len
            self.books.admitted_tokens += len(admit.tokens)
            self.books.shared_tokens += admit.share_len
        for number in group.idle_plans:
            group.idle_plans[number] += 1
        for number in plan.work_sequences:
            group.idle_plans.pop(number, None)
        group.in_flight.append((plan.plan_id, self.books.now))
        logprobs = [
            ("logprob", *pair) for pair in zip(drawn.sequences, drawn.positions, strict=True)
        ]
        self._answer(
            group,
            StepDone(
                plan.group,
                plan.epoch,
                plan.plan_id,
                drawn.sequences,
                drawn.tokens,
                logprobs if self.world.logprobs else (),
                tuple(drawn.failures),
                tuple(drawn.prompts),
            ),
        )

    def _deliver(self, effect: Deliver) -> None:
        self._note(effect.requests, effect.tokens, effect.prompts)
        ensure(not effect.logprobs or len(effect.logprobs) == len(effect.tokens), "logprobs lost")
        asked = self.world.logprobs and bool(effect.tokens)
        ensure(bool(effect.logprobs) == asked, "logprobs lost or invented")
        for number, values in effect.prompts:
            self.seen["prompt scored"] += 1
            self.books.requests[number].take_scores(values)
        for index, (number, token) in enumerate(zip(effect.requests, effect.tokens, strict=True)):
            request = self.books.delivered(number, token)
            if effect.logprobs:
                position = len(request.facts.prompt) + len(request.tokens) - 1
                drawn = ("logprob", number, position)
                ensure(effect.logprobs[index] == drawn, "a logprob of another token")
            if len(request.tokens) == request.stop_after:
                self.at(self.rng.randrange(8), self.clients.end, request, Reason.STOP_STRING)

    def _closed(self, close: Close) -> None:
        self._note(close.request, close.reason.value)
        request = self.books.closed(close)
        if self.happens(0.05):
            self.at(self.rng.randrange(5), self.clients.end, request, Reason.CANCELLED)
        more = request.tokens and self.clients.count < 2 * self.world.requests
        if more and self.rng.random() < self.world.follow_up:
            self.at(self.rng.randrange(30), self.clients.submit, request)

    def _abandoned(self, abandon: Abandon) -> None:
        self._note(abandon.group, abandon.epoch)
        group = self.books.groups[abandon.group]
        ensure(group.worker.epoch == abandon.epoch, "another epoch is abandoned")
        ensure(abandon.detail, "a group is abandoned without a word of why")
        self.books.lost(group)
        if self.rng.random() < 0.5:
            self.at(self.rng.randrange(60), self._down_late, group.name, abandon.epoch)
            self.leaving.told_late(group.name, abandon.epoch)
        self.restart(group.name)

    def restart(self, name: str) -> None:
        self._wedged.discard(name)
        self._busy_until[name] = 0
        self.leaving.down(name)
        spec = next(spec for spec in self.world.groups if spec.name == name)
        self.at(self.rng.randrange(self.world.down_ms_max), self._up, spec)

    # --- what happens to groups

    def _up(self, spec: GroupSpec) -> None:
        self._epochs[spec.name] += 1
        epoch = self._epochs[spec.name]
        if self.world.resizes and self.faults_on and epoch > 1:
            self.seen["resized"] += 1
            spec.limits = draw_limits(self.rng, spec.limits.page_tokens, spec.limits.kv_tokens)
        book = group_book(spec, spec.limits, epoch, self.core.config)
        self.books.groups[spec.name] = book
        self.books.away.pop(spec.name, None)
        model = f"m{spec.model}"
        up = GroupUp(spec.name, epoch, model, "scripted", spec.limits, spec.features, spec.adapters)
        ensure(self.observe(up) == [], "news of a group has effects")

    def _crash(self, spec: GroupSpec) -> None:
        group = self.books.groups.get(spec.name)
        if group is None or not self.faults_on:
            return
        self.seen["crash"] += 1
        self.books.lost(group)
        self.perform(self.observe(GroupDown(spec.name, group.worker.epoch)))
        self.restart(spec.name)

    def _down_late(self, name: str, epoch: int) -> None:
        self.seen["old news"] += name in self.books.groups
        ensure(self.observe(GroupDown(name, epoch)) == [], "an old GroupDown has effects")

    def _answer(self, group: GroupBook, outcome: StepDone) -> None:
        """Sends the outcome on its way, unless the worker is stuck."""
        if self.happens(self.world.faults.wedge_per_step):
            self.seen["wedged"] += group.name not in self._wedged
            self._wedged.add(group.name)
        if group.name in self._wedged:
            return
        spec = next(spec for spec in self.world.groups if spec.name == group.name)
        done = max(self.books.now, self._busy_until[group.name])
        done += self.rng.randint(1, spec.step_ms_max)
        self._busy_until[group.name] = done
        self.at(done - self.books.now, self._outcome, group, outcome)
        if self.happens(self.world.faults.stale_per_step):
            self.at(done - self.books.now + self.rng.randrange(200), self._stale, outcome)

    def _stale(self, outcome: StepDone) -> None:
        """The outcome comes once more, if by now it is one of a former epoch."""
        group = self.books.groups.get(outcome.group)
        if group is None or group.worker.epoch != outcome.epoch:
            self.seen["stale outcome"] += 1
            ensure(self.observe(outcome) == [], "a stale outcome has effects")

    def _outcome(self, group: GroupBook, outcome: StepDone) -> None:
        if self.books.groups.get(group.name) is not group:
            self._stale(outcome)
            return
        present = self.books.resident(group, outcome.plan_id)
        if self.happens(self.world.faults.untrue_per_step):
            last = self._last.get(group.name)
            last = last if last is not None and last.epoch == outcome.epoch else None
            kind, wrong = untrue(self.rng, outcome, last, present)
            self.seen[f"untrue: {kind}"] += 1
            self.perform(self.observe(wrong), {group.name})
            return
        group.in_flight.popleft()
        group.answered_ms = self.books.now
        self._last[group.name] = outcome
        pairs = zip(outcome.sequences, outcome.tokens, strict=True)
        expected = [pair for pair in pairs if pair[0] in present]
        for number, _ in outcome.failures:
            if number in present:
                self.books.due[number] = Reason.ENGINE_FAILED
        effects = self.observe(outcome)
        delivered = [
            pair
            for effect in effects
            if isinstance(effect, Deliver)
            for pair in zip(effect.requests, effect.tokens, strict=True)
        ]
        ensure(delivered == expected, f"delivered {delivered} instead of {expected}")
        self.seen["token thrown away"] += len(outcome.sequences) - len(expected)
        self.perform(effects)
