"""What all engines have in common for which the plan's work is binding (``Scheduling.CALLER``).

The account of sequences, the order within a step, and the bookkeeping of what was drawn are the
same for each of them; an engine adds how a prefix is shared, how memory is let go, and the
computation itself.

A step may be started while the draws of the one before are still under way on the device. A token
that is being drawn is known to be there, but not which one it is: until it is told, ``late`` of its
row in that drawing stands for it among the sequence's tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from shards.engines.base import Engine, Finished, Outcome, Plan, Started
from shards.grammar import Grammar
from shards.grammar_masks import Masks
from shards.prompt_logprobs import Scores, parts_of
from shards.residents import Limits, Resident, Residents
from shards.sampling import Drawn

Work = Sequence[tuple[Resident, int]]
"""Sequences and how many of their next tokens, behind ``computed``, are to be computed."""


class Drawing(Protocol):
    """Draws that may still be under way on a device."""

    @property
    def done(self) -> bool:
        """Whether ``take`` would not wait."""

    def wait(self) -> None:
        """Waits until they are done; from any thread."""

    def take(self) -> Drawn:
        """Waits, and says what was drawn. Called once."""


def late(row: int) -> int:
    """What stands for a token that is being drawn in that row of a drawing, and the reverse."""
    return -1 - row


class Draws(Started):
    """What the rows of a step draw, and where in their tokens that goes."""

    def __init__(self, rows: Sequence[Resident], drawing: Drawing, outcome: Outcome) -> None:
        self._rows = rows
        self._drawing: Drawing | None = drawing
        self._outcome = outcome
        self._places = [len(row.tokens) for row in rows]
        for index, row in enumerate(rows):
            row.tokens.append(late(index))

    @property
    def done(self) -> bool:
        """See ``Started``."""
        return self._drawing is None or self._drawing.done

    def wait(self) -> None:
        """See ``Started``."""
        drawing = self._drawing
        if drawing is not None:
            drawing.wait()

    def finish(self) -> Outcome:
        """See ``Started``."""
        self.settle()
        return self._outcome

    def settle(self) -> None:
        """Waits for the drawing, and makes its tokens known to the sequences, if that is to do."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            settle(self._rows, drawing.take(), self._outcome, self._places)


class CallerEngine(Engine):
    """Base of the engines that compute exactly what the plan says."""

    def __init__(self, limits: Limits) -> None:
        self._residents = Residents(limits)
        self._scores = Scores()
        self._masks = Masks()
        self._draws: Draws | None = None  # those of the last step

    def guide_with(self, grammar: Grammar) -> None:
        """See ``Engine``."""
        self._masks.grammar = grammar

    def reset(self) -> None:
        """See ``Engine``."""
        self._residents.clear()
        self._draws = None

    def step(self, plan: Plan) -> Outcome:
        """See ``Engine``. Sequences draw in the order of the plan's work."""
        return self.start(plan).finish()

    def start(self, plan: Plan) -> Started:
        """See ``Engine``. An engine whose draws are always done has finished then."""
        residents = self._residents
        residents.check(plan)
        if self._draws is not None and self._draws.done:
            self._draws.settle()
        for sequence in plan.drops:
            self._let_go(residents.drop(sequence))
        for admit in plan.admits:
            resident = residents.admit(admit)
            if admit.sampling.constraint is not None:
                resident.guide = self._masks.guide(admit.sampling.constraint, self)
            if admit.share_len:
                donor = residents.by_sequence[admit.share_from]
                self._share(donor, resident, admit.share_len)
        by_sequence = residents.by_sequence
        return self._run([(by_sequence[sequence], count) for sequence, count in plan.work])

    def _run(self, work: Work) -> Started:
        outcome = Outcome()
        draws: Draws | None = None
        for part in parts_of(work):
            if draws is not None:
                draws.settle()  # there are several parts only if they score, and these wait anyway
            going = [pair for pair in part if not pair[0].failed]
            rows = [one for one, count in going if one.computed + count == len(one.tokens)]
            self._masks.begin(rows)
            drawing = self._compute(going, rows) if going else Drawn([])
            for resident, count in going:
                self._residents.compute(resident, count)
            draws = _under_way(rows, drawing, outcome)
        self._scores.tell(outcome)
        self._draws = draws
        return draws or Finished(outcome)

    def _settle_before(self) -> None:
        """Waits for the draws of the step before; for an engine that must know its tokens."""
        if self._draws is not None:
            self._draws.settle()

    def _let_go(self, resident: Resident) -> None:
        """Frees what the engine holds for a sequence that was dropped."""

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        """Makes a sequence start as a copy of the first ``length`` tokens of another one."""

    @abstractmethod
    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawing:
        """Computes the work, and draws the next token of each of ``rows``.

        ``rows`` are the sequences whose known tokens are all computed by this work, in its order;
        there may be none. ``Resident.computed`` still says what was computed before. An engine that
        scores prompts tells ``_scores`` of them.

        An engine that returns draws before they are done takes the tokens ``late`` into its next
        computation, from the rows of these draws, or calls ``_settle_before`` first.
        """


def _under_way(rows: Sequence[Resident], drawing: Drawing, outcome: Outcome) -> Draws | None:
    """What the rows draw, unless that is done: then it is told at once."""
    if not drawing.done:
        return Draws(rows, drawing, outcome)
    settle(rows, drawing.take(), outcome)
    return None


def settle(
    rows: Sequence[Resident], drawn: Drawn, outcome: Outcome, places: Sequence[int] = ()
) -> None:
    """Makes what was drawn known to the sequences, and tells it.

    ``places`` are those in the sequences' tokens that were kept free; none: the tokens' ends.
    """
    for index, (row, token) in enumerate(zip(rows, drawn.tokens, strict=True)):
        if row.failed:
            continue
        if index in drawn.failures:
            row.failed = True
            outcome.failures[row.sequence] = drawn.failures[index]
            continue
        if places:
            row.tokens[places[index]] = token
        else:
            row.tokens.append(token)
        outcome.sequences.append(row.sequence)
        outcome.tokens.append(token)
        if index in drawn.logprobs:
            outcome.logprobs[row.sequence] = drawn.logprobs[index]
