"""One step of one group: decodes first, then prefill chunks in order of placement, in the budget.

Long prompts are computed in chunks beside the decodes of the others, so a prompt never stalls a
running stream for longer than one step (chunked prefill, arXiv:2308.16369).
"""

from router.core.effects import Admit, RunPlan
from router.core.placing import account_of, extend
from router.core.state import CoreConfig, Group, InFlight, Sequence


def next_plan(
    group: Group, now_ms: int, config: CoreConfig
) -> tuple[RunPlan | None, list[Sequence]]:
    """The next plan of a group that has a place in flight, if there is any work, or drops.

    Returns also the sequences that had to give up their memory and want to wait in line again.
    """
    preempted = _reserve_ahead(group, config)
    step = _Step(group, group.plans + 1)
    step.decode()
    if group.filling:
        step.fill()
    if not step.work and not group.drops:
        return None, preempted
    return step.seal(now_ms), preempted


def _reserve_ahead(group: Group, config: CoreConfig) -> list[Sequence]:
    """Extends the reservation of every decode that would otherwise run out of it in this step."""
    preempted: list[Sequence] = []
    for sequence in list(group.decoding.values()):
        account = sequence.account
        if account is not None and account.reserved <= sequence.scheduled < sequence.end - 1:
            preempted += extend(group, sequence, config)
    return preempted


class _Step:
    """A plan in the making."""

    def __init__(self, group: Group, plan_id: int) -> None:
        self.group = group
        self.plan_id = plan_id
        self.budget = group.step_tokens_max
        self.work: dict[int, int] = {}
        self.admits: list[Admit] = []
        self.samples: dict[int, None] = {}
        self.scored: tuple[int, ...] = ()

    def decode(self) -> None:
        """One token for each sequence that has not been promised its last one."""
        work = self.work
        for sequence in self.group.decoding.values():
            if sequence.scheduled < sequence.end - 1:
                sequence.scheduled += 1
                work[sequence.facts.request] = 1
        assert len(work) <= self.budget, "a group decodes more sequences than a step has tokens"
        self.samples = dict.fromkeys(work)
        self.budget -= len(work)

    def fill(self) -> None:
        """Chunks of the prompts, in order of placement, until the budget is used up."""
        for sequence in list(self.group.filling.values()):
            if self.budget == 0:
                return
            if not sequence.admitted and not self._admit(sequence):
                continue
            chunk = min(self.budget, len(sequence.tokens) - sequence.scheduled)
            sequence.scheduled += chunk
            self.work[sequence.id] = chunk
            self.budget -= chunk
            if sequence.scheduled == len(sequence.tokens):
                self._first_sample(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Makes the sequence resident, unless the prefix it is to share is not computed yet.

        Admits apply before the step, so what this very plan computes does not count.
        """
        account = account_of(sequence)
        source = 0
        if account.parent is not None:
            parent = self.group.holder(account.parent.holder)
            computed = parent.scheduled - self.work.get(parent.id, 0)
            if not parent.admitted or computed < account.share_len:
                return False
            source = parent.id
        sequence.admitted_by = self.plan_id
        sequence.scheduled = account.share_len
        self.admits.append(
            Admit(
                sequence.id,
                tuple(sequence.tokens),
                sequence.prompt_len,
                source,
                account.share_len,
                sequence.facts.sampling,
                sequence.facts.adapter,
            )
        )
        return True

    def _first_sample(self, sequence: Sequence) -> None:
        self.samples[sequence.id] = None
        if sequence.scores_prompt:
            self.scored = (*self.scored, sequence.id)
        del self.group.filling[sequence.id]
        self.group.decoding[sequence.id] = sequence

    def seal(self, now_ms: int) -> RunPlan:
        """Counts the plan as sent."""
        group = self.group
        drops, group.drops = tuple(group.drops), []
        group.plans = self.plan_id
        group.in_flight.append(InFlight(self.plan_id, now_ms, self.samples, self.scored))
        return RunPlan(
            group.up.group,
            group.up.epoch,
            self.plan_id,
            drops,
            tuple(self.admits),
            tuple(self.work),
            tuple(self.work.values()),
        )
