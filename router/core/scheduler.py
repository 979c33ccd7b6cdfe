"""The core itself: what happens to a request, from the event that brings it to its end.

    Submitted ──► waiting line ──► placed in a group ──► resident, producing ──► closed
                       ▲                  │                      │
                       └────────────── preempted, lost ◄─────────┘

``observe`` keeps the books, ``plan`` holds the policy; so a burst of arrivals is considered
together, and the policy can change without touching the books. ``plan`` places all it can before it
forms any step: otherwise one group could be stepped before the head of the line was given to it.
"""

import heapq
from typing import assert_never

from router.core.away import Away
from router.core.effects import Abandon, Close, Deliver, Effect, RunPlan
from router.core.events import (
    Ended,
    Event,
    GroupDown,
    GroupGone,
    GroupLeaving,
    GroupUp,
    Reason,
    StepDone,
    Submitted,
    Ticked,
)
from router.core.leaving import bound, move, running, tell_left
from router.core.outcomes import untrue
from router.core.placing import place, ranked, remove, retire
from router.core.planning import next_plan
from router.core.refusing import able, refusal_of
from router.core.scoring import news
from router.core.snapshot import Counters, Snapshot, take_snapshot
from router.core.state import CoreConfig, Group, Sequence, new_group
from router.core.stranded import Stranded
from router.core.waiting import WaitingLine


class Core:
    """The scheduler of one router. Not thread-safe; owned by the driver."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.counters = Counters()
        self._live: dict[int, Sequence] = {}
        self._lines: dict[str, WaitingLine] = {}
        self._groups: dict[str, Group] = {}
        self._deadlines: list[tuple[int, int]] = []
        self._stranded = Stranded(config.resume_timeout_ms)
        self._away = Away(config)
        # Whether groups have come or gone since those who were set aside were thought of.
        self._regrouped = False
        self._arrivals = 0

    def observe(self, now_ms: int, event: Event) -> list[Effect]:
        """Records one thing that has happened."""
        match event:
            case StepDone():
                return self._step_done(now_ms, event)
            case Submitted():
                return self._submitted(now_ms, event)
            case Ended():
                return self._ended(event)
            case GroupUp():
                self._group_up(event)
            case GroupDown():
                return self._group_down(now_ms, event.group, event.epoch)
            case GroupLeaving():
                return self._group_leaving(event)
            case GroupGone():
                self._away.forget(event.group)
                self._regrouped = True
            case Ticked():
                pass
            case _:
                assert_never(event)
        return []

    def plan(self, now_ms: int) -> list[Effect]:
        """Decides all that can be decided now. Called again at once, it returns nothing."""
        effects = self._expire(now_ms)
        if self._regrouped:
            effects += self._reconsider()
        before = -1
        while before < len(effects):
            for group in self._groups.values():
                if group.leaving:
                    self._move_on(group)
            for line in self._lines.values():
                if line.members:
                    effects += self._place_from(line)
            before = len(effects)
            for group in self._groups.values():
                if len(group.in_flight) < self.config.plans_in_flight_max:
                    effects += self._step(group, now_ms)
        effects += self._give_up(now_ms)
        for group in self._groups.values():
            if group.leaving:
                effects += tell_left(group)
        return effects

    def wake_at(self) -> int | None:
        """The instant at which ``plan`` has to be called even if nothing happens, or None."""
        groups, config = self._groups.values(), self.config
        due = [group.answer_due_ms(config) for group in groups if group.in_flight]
        if self._stranded.since:
            due.append(self._stranded.due_ms())
        # A group that is away is given up for those who wait for it, if there are any.
        if self._away.groups and any(line.hopes() for line in self._lines.values()):
            due.append(self._away.due_ms())
        while self._deadlines and self._deadlines[0][1] not in self._live:
            heapq.heappop(self._deadlines)
        if self._deadlines:
            due.append(self._deadlines[0][0])
        return min(due, default=None)

    def snapshot(self) -> Snapshot:
        """The state in numbers, for metrics and people."""
        waiting = sum(len(line) for line in self._lines.values())
        return take_snapshot(waiting, list(self._groups.values()), self.counters)

    # --- requests

    def _submitted(self, now_ms: int, facts: Submitted) -> list[Effect]:
        assert facts.request not in self._live
        assert len(facts.prompt) > 0 < facts.max_tokens
        if len(self._live) >= self.config.requests_max:
            detail = f"{self.config.requests_max} requests are waiting or running"
            return [Close(facts.request, Reason.OVERLOADED, detail)]
        self._arrivals += 1
        arrived_ms = now_ms + facts.priority * self.config.head_start_ms
        end = len(facts.prompt) + facts.max_tokens
        sequence = Sequence(facts, (arrived_ms, self._arrivals), list(facts.prompt), end)
        refusal = self._refusal(sequence)
        waits = self._waits_aside(sequence)
        if refusal is None and waits and self._crowded_aside():
            detail = "too many requests wait for a worker that is away"
            refusal = Close(sequence.id, Reason.OVERLOADED, detail)
        if refusal is not None:
            return [refusal]
        self._live[facts.request] = sequence
        self._line_of(sequence).add(sequence)
        if waits:
            self._line_of(sequence).set_aside(sequence.id)
        if facts.deadline_ms is not None:
            heapq.heappush(self._deadlines, (facts.deadline_ms, facts.request))
            if len(self._deadlines) > 2 * len(self._live) + 16:  # most are of those that have ended
                self._deadlines = [due for due in self._deadlines if due[1] in self._live]
                heapq.heapify(self._deadlines)
        return []

    def _refusal(self, sequence: Sequence) -> Close | None:
        """Why no group could ever run the sequence, of those that are up or to come up again."""
        refusal = refusal_of(self._serving(sequence.facts.model), sequence)
        expected = self._expected(sequence.facts.model) if refusal is not None else ()
        return None if any(able(group, sequence) for group in expected) else refusal

    def _waits_aside(self, sequence: Sequence) -> bool:
        """Whether groups are up, and none of them is of use."""
        return bool(self._serving(sequence.facts.model)) and not self._able(sequence)

    def _crowded_aside(self) -> bool:
        """Whether those that are set aside leave only half of the places to all others."""
        aside = sum(len(line.aside) for line in self._lines.values())
        return 2 * aside >= self.config.requests_max

    def _ended(self, event: Ended) -> list[Effect]:
        if event.request not in self._live:
            return []
        return [self._close(self._live[event.request], event.reason)]

    def _close(
        self, sequence: Sequence, reason: Reason, detail: str = "", useful: bool = True
    ) -> Close:
        """Ends a live request, wherever it is; the only way out of ``_live``.

        What it has computed, if it is ``useful``, stays for others to share.
        """
        del self._live[sequence.id]
        if sequence.group is None:
            line = self._line_of(sequence)
            if sequence.id in line:
                line.remove(sequence.id)
        elif useful:
            self._wait_again(retire(sequence.group, sequence))
        else:
            self._wait_again(remove(sequence.group, sequence))
        return Close(sequence.id, reason, detail)

    def _expire(self, now_ms: int) -> list[Effect]:
        """Ends what has missed its deadline, requests and groups."""
        effects: list[Effect] = []
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            request = heapq.heappop(self._deadlines)[1]
            if request in self._live:
                detail = "the deadline passed before the answer was complete"
                effects.append(self._close(self._live[request], Reason.DEADLINE, detail))
        for group in list(self._groups.values()):
            if group.in_flight and group.answer_due_ms(self.config) <= now_ms:
                detail = f"no answer to a plan within {self.config.step_deadline_ms} ms"
                effects += self._abandon(now_ms, group, detail)
        if self._away.groups:
            self._regrouped |= self._away.give_up(now_ms)
        return effects

    def _give_up(self, now_ms: int) -> list[Close]:
        """Ends answers that have begun and had no group to go on in for too long."""
        begun: list[Sequence] = []
        for model, line in self._lines.items():
            if line.members or line.aside:
                begun += line.begun(aside=bool(self._serving(model)))
        if not begun and not self._stranded.since:
            return []
        over = self._stranded.give_up(now_ms, begun)
        return [self._close(one, Reason.WORKER_LOST, self._stranded.detail) for one in over]

    # --- groups

    def _group_up(self, event: GroupUp) -> None:
        assert event.group not in self._groups, "a group came up twice"
        self._groups[event.group] = new_group(event, self.config)
        self._away.forget(event.group)
        self._regrouped = True

    def _group_down(self, now_ms: int, name: str, epoch: int) -> list[Effect]:
        group = self._groups.get(name)
        if group is None or group.up.epoch != epoch:
            return []
        del self._groups[name]
        self._away.went(now_ms, group)
        effects: list[Effect] = []
        for sequence in [*group.decoding.values(), *group.filling.values()]:
            was_resident = sequence.admitted
            sequence.leave()
            lost = self._lost(sequence) if was_resident else None
            if lost is None:
                self._wait_again([sequence])
            else:
                effects.append(self._close(sequence, Reason.WORKER_LOST, lost))
        return effects

    def _lost(self, sequence: Sequence) -> str | None:
        """Counts the loss of a resident sequence; says why it cannot go on, if it cannot."""
        sequence.lose(self.config.progress_tokens_min)
        if sequence.produced and not self.config.resume_streams:
            return "the worker was lost in the middle of the answer"
        if sequence.losses >= self.config.attempts_max:
            return f"the worker was lost {sequence.losses} times in a row with this request"
        self.counters.resumed += 1
        return None

    def _group_leaving(self, event: GroupLeaving) -> list[Effect]:
        group = self._groups.get(event.group)
        if group is None or group.up.epoch != event.epoch:
            return []
        group.leaving, group.returns = True, event.returns
        self._regrouped = True
        return self._turn_out(group) if event.at_once else []

    def _turn_out(self, group: Group) -> list[Effect]:
        """Sends all that runs in a group back into line."""
        effects: list[Effect] = []
        for sequence in running(group):
            if sequence.group is not group:
                continue  # it was to share what another held, and is in line already
            if bound(sequence, self.config):
                lost = "the worker was taken away in the middle of the answer"
                effects.append(self._close(sequence, Reason.WORKER_LOST, lost))
            else:
                self.counters.moved += sequence.admitted
                self._wait_again([*remove(group, sequence), sequence])
        return effects

    def _move_on(self, group: Group) -> None:
        """Moves what runs in a group that leaves to others, as far as they have room."""
        for sequence in running(group):
            if sequence.group is group and not bound(sequence, self.config):
                admitted = sequence.admitted
                displaced = move(sequence, self._able(sequence), self.config)
                if displaced is not None:
                    self.counters.moved += admitted
                    self._wait_again(displaced)

    def _abandon(self, now_ms: int, group: Group, detail: str) -> list[Effect]:
        """Gives up a group that cannot be trusted, before its links notice anything."""
        name, epoch = group.up.group, group.up.epoch
        return [Abandon(name, epoch, detail), *self._group_down(now_ms, name, epoch)]

    def _serving(self, model: str) -> list[Group]:
        """The groups in which a sequence of the model may be placed."""
        return [one for one in self._groups.values() if one.up.model == model and not one.leaving]

    def _expected(self, model: str) -> list[Group]:
        """Those that serve the model no more, and are likely to do so again."""
        leaving = [one for one in self._groups.values() if one.leaving and one.returns]
        return [*self._away.of(model), *(one for one in leaving if one.up.model == model)]

    def _able(self, sequence: Sequence) -> list[Group]:
        return [group for group in self._serving(sequence.facts.model) if able(group, sequence)]

    # --- steps

    def _step_done(self, now_ms: int, event: StepDone) -> list[Effect]:
        group = self._groups.get(event.group)
        if group is None or group.up.epoch != event.epoch:
            return []
        fault = untrue(group, event)
        if fault is not None:
            return self._abandon(now_ms, group, fault)
        group.in_flight.popleft()
        group.answered_ms = now_ms
        effects = self._deliver(group, event)
        return effects + self._failed(group, event) if event.failures else effects

    def _deliver(self, group: Group, event: StepDone) -> list[Effect]:
        """Passes on the tokens of those who are still there, and ends those who are complete."""
        scores = news(group, event) if event.prompts else []
        delivery, closings = Deliver([], [], [], scores), list[Effect]()
        for index, request in enumerate(event.sequences):
            sequence = group.decoding.get(request)
            if sequence is None or sequence.admitted_by > event.plan_id:
                continue
            token = event.tokens[index]
            sequence.tokens.append(token)
            delivery.requests.append(request)
            delivery.tokens.append(token)
            if event.logprobs:
                delivery.logprobs.append(event.logprobs[index])
            if token in sequence.facts.stop_tokens:
                closings.append(self._close(sequence, Reason.EOS))
            elif len(sequence.tokens) == sequence.end:
                closings.append(self._close(sequence, Reason.LENGTH))
        return [delivery, *closings] if delivery.requests or delivery.prompts else closings

    def _failed(self, group: Group, event: StepDone) -> list[Effect]:
        """Ends the sequences that failed; plans in flight can draw nothing more for them."""
        effects: list[Effect] = []
        for request, message in event.failures:
            sequence = group.placed(request)
            born = sequence.admitted_by if sequence is not None else 0
            for later in group.in_flight:
                # After a preemption the same number may already stand for a new, sound sequence.
                if not event.plan_id < born <= later.plan_id:
                    later.samples.pop(request, None)
            if sequence is not None and 0 < born <= event.plan_id:
                effects.append(self._close(sequence, Reason.ENGINE_FAILED, message, False))
        return effects

    def _step(self, group: Group, now_ms: int) -> list[RunPlan]:
        plan, preempted = next_plan(group, now_ms, self.config)
        if preempted:
            self.counters.preempted += len(preempted)
            self._wait_again(preempted)
        if plan is None:
            return []
        for admit in plan.admits:
            self.counters.prefix_hit_tokens += admit.share_len
            self.counters.admitted_tokens += len(admit.tokens)
        return [plan]

    # --- the waiting lines

    def _line_of(self, sequence: Sequence) -> WaitingLine:
        return self._lines.setdefault(sequence.facts.model, WaitingLine())

    def _wait_again(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._line_of(sequence).add(sequence)

    def _reconsider(self) -> list[Effect]:
        """Puts those back into line for whom a group is of use by now, and ends who has no hope."""
        self._regrouped = False
        effects: list[Effect] = []
        for sequence in [one for line in self._lines.values() for one in line.aside.values()]:
            if not self._waits_aside(sequence):
                self._line_of(sequence).recall(sequence.id)
            elif not sequence.produced and (refusal := self._refusal(sequence)) is not None:
                effects.append(self._close(sequence, refusal.reason, refusal.detail))
        return effects

    def _place_from(self, line: WaitingLine) -> list[Effect]:
        """Places the head of the line for as long as there is room; nobody overtakes it."""
        effects: list[Effect] = []
        while (head := line.head()) is not None:
            if self._waits_aside(head):
                refusal = self._refusal(head)
                if refusal is None or head.produced:
                    line.set_aside(head.id)  # who could run it is away, or may be
                else:
                    effects.append(self._close(head, refusal.reason, refusal.detail))
                continue
            groups = ranked(self._able(head), head, self.config)
            if not any(place(group, head, self.config) for group in groups):
                break
            line.remove(head.id)
        return effects
