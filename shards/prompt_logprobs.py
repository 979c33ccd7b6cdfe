"""Log probabilities of prompt tokens, from the logits at the positions before them.

The logits behind the token at a position say how likely the token at the next one is. So a chunk of
a prompt scores the tokens that come one later: its last position scores the first token of the next
chunk. Nothing scores the first token of a prompt, and the last token of a prompt draws.

Logits are large: a row has a number for each token of the vocabulary. So work is cut until no
forward pass scores more than ``ROWS_MAX`` tokens, and rows are reduced at once to what is wanted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import Outcome, PromptLogprobs
from shards.filters import Floats, largest
from shards.residents import Resident

ROWS_MAX = 128
# Numbers that are exponentiated at once: 4 MiB of them.
_BLOCK = 1 << 20
_NOT_FINITE = "the engine's logits are not finite numbers"

Work = Sequence[tuple[Resident, int]]
Pairs = list[tuple[int, float]]


def targets_of(resident: Resident, count: int) -> Sequence[int]:
    """The prompt tokens that the next ``count`` tokens of a sequence score, if it asks for them."""
    if not resident.sampling.prompt_logprobs:
        return ()
    start = resident.computed + 1
    return resident.tokens[start : min(start + count, resident.prompt_len)]


def parts_of(work: Work) -> list[Work]:
    """The work of a step cut into passes that score no more than ``ROWS_MAX`` tokens each.

    The last one has something of every sequence, and so everything that draws.
    """
    if not any(resident.sampling.prompt_logprobs for resident, _ in work):
        return [work]
    scored = {one.sequence: len(targets_of(one, count)) for one, count in work}
    excess = sum(scored.values()) - ROWS_MAX
    if excess <= 0:
        return [work]
    parts: list[Work] = []
    rest: list[tuple[Resident, int]] = []
    for resident, count in work:
        spare = max(0, min(excess, scored[resident.sequence] - 1))
        parts += ([(resident, min(ROWS_MAX, spare - at))] for at in range(0, spare, ROWS_MAX))
        rest.append((resident, count - spare))
        excess -= spare
    return [*parts, rest]


@dataclass(slots=True)
class Scored:
    """Some successive tokens of one prompt.

    ``pairs`` and ``ranks`` are empty unless likeliest tokens, or ranks, were asked for.
    """

    start: int
    logprobs: list[float] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)


class Scores:
    """What the passes of one step say of prompts: filled by the engine, emptied by ``tell``."""

    def __init__(self) -> None:
        self._scored: dict[int, Scored] = {}
        self._failed: list[int] = []

    def rows_of(self, work: Work) -> int:
        """How many rows of logits these passes need for scores."""
        rows = 0
        for resident, count in work:
            if resident.sampling.prompt_logprobs:
                rows += len(targets_of(resident, count))
        return rows

    def part(self, work: Work, logits: Floats) -> Floats:
        """Scores what is due; returns the rows that draw.

        ``logits`` are [rows, vocabulary] in the order of the work's tokens: of all that are scored
        or draw, and of no others.
        """
        draws: list[int] = []
        at = 0
        for resident, count in work:
            scores = resident.sampling.prompt_logprobs
            if scores and (targets := targets_of(resident, count)):
                self.take(resident, targets, logits[at : at + len(targets)])
                at += len(targets)
            if resident.computed + count == len(resident.tokens):
                draws.append(at)
                at += 1
        return logits if at == len(draws) else logits[draws]

    def take(self, resident: Resident, targets: Sequence[int], logits: Floats) -> None:
        """Scores the next targets of a sequence by their logits [targets, vocabulary]."""
        sampling = resident.sampling
        top = min(sampling.top_logprobs, logits.shape[1])
        rows = max(1, _BLOCK // logits.shape[1])
        for start in range(0, len(targets), rows):
            block, wanted = logits[start : start + rows], targets[start : start + rows]
            ranks = ranks_of(block, wanted) if sampling.ranks else ()
            self.add(resident, *score(block, wanted, top), ranks)

    def add(
        self,
        resident: Resident,
        logprobs: Sequence[float],
        pairs: Sequence[Pairs],
        ranks: Sequence[int] = (),
        start: int | None = None,
    ) -> None:
        """Takes the scores of the next targets of a sequence. It fails if one is not a number.

        An engine that tells of the whole prompt at its end says where they ``start``.
        """
        # Zero probability is a number, whose logarithm is not finite.
        if not all(logprob < math.inf for logprob in logprobs):
            resident.failed = True
            self._failed.append(resident.sequence)
            return
        scored = self._scored.get(resident.sequence)
        if scored is None:
            first = resident.computed + 1 if start is None else start
            scored = self._scored[resident.sequence] = Scored(first)
        scored.logprobs += logprobs
        scored.pairs += pairs
        scored.ranks += ranks

    def tell(self, outcome: Outcome) -> None:
        """Puts into the outcome what there is to tell, and forgets it."""
        if not (self._scored or self._failed):
            return
        for sequence in self._failed:
            outcome.failures[sequence] = _NOT_FINITE
            self._scored.pop(sequence, None)
        for sequence, scored in self._scored.items():
            told = PromptLogprobs(scored.start, scored.logprobs, scored.pairs, scored.ranks)
            outcome.prompt_logprobs[sequence] = told
        self._scored, self._failed = {}, []


def score(logits: Floats, targets: Sequence[int], top: int) -> tuple[list[float], list[Pairs]]:
    """Raw log probabilities of a target in each row, and the ``top`` likeliest tokens of each.

    Of equal tokens the smaller id goes first. All are NaN if a row's largest logit is no number.
    """
    peaks = logits.max(axis=1)
    if not np.isfinite(peaks).all():
        return [math.nan] * len(targets), []
    weights = np.exp(logits - peaks[:, None])
    totals = peaks.astype(np.float64) + np.log(weights.sum(axis=1).astype(np.float64))
    rows = np.arange(len(targets))
    values: NDArray[np.float64] = logits[rows, np.asarray(targets)] - totals
    if not top:
        return values.tolist(), []
    return values.tolist(), [
        _likeliest(row, top, total) for row, total in zip(logits, totals.tolist(), strict=True)
    ]


def ranks_of(logits: Floats, targets: Sequence[int]) -> list[int]:
    """How many tokens are likelier than the target of each row, plus 1."""
    wanted = logits[np.arange(len(targets)), np.asarray(targets)]
    ranks: list[int] = (np.count_nonzero(logits > wanted[:, None], axis=1) + 1).tolist()
    return ranks


def _likeliest(row: Floats, top: int, total: float) -> Pairs:
    ids = largest(row, top)
    ids = ids[np.argsort(-row[ids], kind="stable")]
    return [(int(token), float(row[token]) - total) for token in ids]
