"""What all engines have in common for which the plan's work is binding (``Scheduling.CALLER``).

The account of sequences, the order within a step, and the bookkeeping of what was drawn are the
same for each of them; an engine adds how a prefix is shared, how memory is let go, and the
computation itself.
"""

from abc import abstractmethod
from collections.abc import Sequence

from shards.engines.base import Engine, Outcome, Plan
from shards.grammar import Grammar
from shards.grammar_masks import Masks
from shards.prompt_logprobs import Scores, parts_of
from shards.residents import Limits, Resident, Residents
from shards.sampling import Drawn

Work = Sequence[tuple[Resident, int]]
"""Sequences and how many of their next tokens, behind ``computed``, are to be computed."""


class CallerEngine(Engine):
    """Base of the engines that compute exactly what the plan says."""

    def __init__(self, limits: Limits) -> None:
        self._residents = Residents(limits)
        self._scores = Scores()
        self._masks = Masks()

    def guide_with(self, grammar: Grammar) -> None:
        """See ``Engine``."""
        self._masks.grammar = grammar

    def reset(self) -> None:
        """See ``Engine``."""
        self._residents.clear()

    def step(self, plan: Plan) -> Outcome:
        """See ``Engine``. Sequences draw in the order of the plan's work."""
        residents = self._residents
        residents.check(plan)
        for sequence in plan.drops:
            self._let_go(residents.drop(sequence))
        for admit in plan.admits:
            resident = residents.admit(admit)
            if admit.sampling.constraint is not None:
                resident.guide = self._masks.guide(admit.sampling.constraint, self)
            if admit.share_len:
                donor = residents.by_sequence[admit.share_from]
                self._share(donor, resident, admit.share_len)
        outcome = Outcome()
        by_sequence = residents.by_sequence
        work = [(by_sequence[sequence], count) for sequence, count in plan.work]
        if work:
            self._run(work, outcome)
        return outcome

    def _run(self, work: Work, outcome: Outcome) -> None:
        for part in parts_of(work):
            going = [(one, count) for one, count in part if not one.failed]
            rows = [one for one, count in going if one.computed + count == len(one.tokens)]
            self._masks.begin(rows)
            drawn = self._compute(going, rows) if going else Drawn([])
            for resident, count in going:
                self._residents.compute(resident, count)
            if rows:
                settle(rows, drawn, outcome)
        self._scores.tell(outcome)

    def _let_go(self, resident: Resident) -> None:
        """Frees what the engine holds for a sequence that was dropped."""

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        """Makes a sequence start as a copy of the first ``length`` tokens of another one."""

    @abstractmethod
    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawn:
        """Computes the work, and draws the next token of each of ``rows``.

        ``rows`` are the sequences whose known tokens are all computed by this work, in its order;
        there may be none. ``Resident.computed`` still says what was computed before. An engine that
        scores prompts tells ``_scores`` of them.
        """


def settle(rows: Sequence[Resident], drawn: Drawn, outcome: Outcome) -> None:
    """Makes what was drawn known to the sequences, and tells it."""
    for index, (row, token) in enumerate(zip(rows, drawn.tokens, strict=True)):
        if row.failed:
            continue
        if index in drawn.failures:
            row.failed = True
            outcome.failures[row.sequence] = drawn.failures[index]
            continue
        row.tokens.append(token)
        outcome.sequences.append(row.sequence)
        outcome.tokens.append(token)
        if index in drawn.logprobs:
            outcome.logprobs[row.sequence] = drawn.logprobs[index]
