"""Base of the engines that own a paged KV cache: the plan in, arrays out to the device.

An engine of this kind says how to compute one ``StepLayout``; everything else (what a plan may do,
which page is whose, sampling) is here and in ``caller``.
"""

from abc import abstractmethod
from collections.abc import Sequence

from shards.engines.caller import CallerEngine, Drawing, Work
from shards.filters import Floats
from shards.kv import PageTables, StepLayout, lay_out
from shards.prompt_logprobs import targets_of
from shards.residents import Limits, Resident
from shards.sampling import Drawn, Sampler


class PagedEngine(CallerEngine):
    """See the module."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._tables = PageTables(limits.kv_tokens, limits.page_tokens)
        self._sampler = Sampler(limits.vocab_size)
        self._scoring: Work = ()

    def reset(self) -> None:
        """See ``Engine``. The cache's contents need not be cleared: nobody refers to them."""
        super().reset()
        self._tables.clear()

    def _let_go(self, resident: Resident) -> None:
        self._tables.drop(resident.sequence)

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        self._tables.share(donor.sequence, resident.sequence, length)

    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawing:
        layout = lay_out(self._tables, work, rows)
        self._scoring = work if len(layout.scores) else ()
        return self._draw(layout, rows)

    def _draw(self, layout: StepLayout, rows: Sequence[Resident]) -> Drawing:
        """Computes the step and draws. An engine overrides this to draw on its device."""
        logits = self._forward(layout)
        return self._sampler.draw(logits, rows) if rows else Drawn([])

    def _score(self, logits: Floats) -> None:
        """Scores the prompts of ``_scoring`` by their logits [scores, vocabulary]."""
        at = 0
        for resident, count in self._scoring:
            targets = targets_of(resident, count)
            if targets:
                self._scores.take(resident, targets, logits[at : at + len(targets)])
                at += len(targets)

    @abstractmethod
    def _forward(self, layout: StepLayout) -> Floats:
        """Computes one step; returns float32 logits [draws, vocabulary] in host memory.

        An engine with the feature "prompt_logprobs" also calls ``_score`` if the layout has scores.
        """
