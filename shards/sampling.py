"""The one sampler: draws the next token of each sequence from a batch of logits.

Order, per row: watermark, logit bias, penalties, the min_tokens mask, the mask of a constraint,
temperature, top_k, then top_p, min_p and typical_p, then one draw. The watermark goes first, as in
TGI; the rest is the order of the ``transformers`` library [1], where each filter sees the
distribution that the former one left, renormalised. Sources:

- top_p: arXiv:1904.09751. min_p: arXiv:2407.01082. typical_p: arXiv:2202.00666.
- repetition penalty: arXiv:1909.05858, section 4.1. Frequency and presence penalty: as in the
  OpenAI API. All three look at generated tokens only.
- Where equal logits compete for the last place of a filter, the smaller token id wins.
- The draw inverts the cumulative distribution, in the order of token ids, at one uniform number
  that is a function of (seed, position): splitmix64 [2] of the two. There is no state, so a draw
  does not depend on what else is in the batch, and a resumed sequence draws the same.

[1] ``generation/utils.py``, ``_get_logits_processor``. [2] Steele et al., OOPSLA 2014,
doi:10.1145/2660193.2660195.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shards.allowed import GuideError, Guiding, holds, pick
from shards.engines.base import Logprobs, SamplingParams
from shards.filters import Floats, Ids, keep, largest
from shards.watermark import mark

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256
_MINUS_INF = np.float32(-np.inf)


class Row(Protocol):
    """What the sampler needs to know of a sequence."""

    @property
    def sampling(self) -> SamplingParams:
        """How to draw."""

    @property
    def tokens(self) -> Sequence[int]:
        """All tokens so far; the drawn one comes behind them."""

    @property
    def prompt_len(self) -> int:
        """How many of the tokens are prompt."""

    @property
    def plain(self) -> bool:
        """Whether the argmax of the raw logits is all that is wanted."""

    @property
    def guide(self) -> Guiding | None:
        """The constraint, if there is one; then the row is not plain."""


@dataclass(slots=True)
class Drawn:
    """One token per row; what was asked for beside it, and faults, by index of the row."""

    tokens: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def splitmix64(value: int) -> int:
    """Scatters 64 bits, a bijection."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone."""
    return (splitmix64(splitmix64(seed & _MASK) ^ position) >> 11) * 2.0**-53


class Sampler:
    """Draws tokens for one engine. Holds scratch memory, so it serves one thread."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        blocks = -(-vocab_size // _BLOCK)
        self._padded: Floats = np.zeros(blocks * _BLOCK, np.float32)
        self._weights = self._padded[:vocab_size]
        self._adjusted: Floats = np.empty(vocab_size, np.float32)

    def draw(self, logits: Floats, rows: Sequence[Row]) -> Drawn:
        """One token for each row of ``logits`` [rows, vocabulary], which are not changed.

        A row whose logits are not finite gets token 0 and an entry in ``failures``.
        """
        if all(row.plain for row in rows):
            best: Ids = logits.argmax(axis=1)
            tops: list[float] = logits[np.arange(len(best)), best].tolist()
            drawn = Drawn(best.tolist())
            for index, top in enumerate(tops):
                self._check(drawn, index, top)
            return drawn
        drawn = Drawn([0] * len(rows))
        for index, row in enumerate(rows):
            # One row after the other, so that it is read from memory once and then from the cache.
            raw = logits[index]
            token = drawn.tokens[index] = int(raw.argmax())
            top = float(raw[token])
            if self._check(drawn, index, top) and not row.plain:
                self._draw_row(raw, row, drawn, index, top)
        return drawn

    def _check(self, drawn: Drawn, index: int, top: float) -> bool:
        """Whether the row is sound; NaN counts as the largest value, so the largest tells."""
        if math.isfinite(top):
            return True
        self._fail(drawn, index, "the engine's logits are not finite numbers")
        return False

    @staticmethod
    def _fail(drawn: Drawn, index: int, message: str) -> None:
        drawn.tokens[index] = 0
        drawn.failures[index] = message

    def _draw_row(self, raw: Floats, row: Row, drawn: Drawn, index: int, top: float) -> None:
        sampling = row.sampling
        logits, best, peak = raw, drawn.tokens[index], top
        if _adjusts(row):
            logits = self._adjust(raw, row)
            best = int(logits.argmax())
            peak = float(logits[best])
            if not math.isfinite(peak):
                self._fail(drawn, index, "bias, penalties and min_tokens leave no token to draw")
                return
        ids: Ids | None = None
        if row.guide is not None:
            try:
                words = row.guide.allowed()
                if sampling.temperature > 0.0 or not holds(words, best):
                    logits, ids, best = pick(logits, words, best, self._adjusted)
            except GuideError as error:
                self._fail(drawn, index, str(error))
                return
            peak = float(logits[best])
        token = best
        if sampling.temperature > 0.0:
            chance = uniform(sampling.seed, len(row.tokens))
            token = self._sample(logits, ids, sampling, peak, chance)
        elif ids is not None:
            token = int(ids[best])
        drawn.tokens[index] = token
        if sampling.logprobs:
            drawn.logprobs[index] = self._logprobs(raw, token, top, sampling)

    def _adjust(self, raw: Floats, row: Row) -> Floats:
        """A copy of the row with watermark, bias, penalties and the mask of min_tokens applied."""
        sampling, logits = row.sampling, self._adjusted
        np.copyto(logits, raw)
        if sampling.watermark is not None:
            mark(logits, row.tokens[-1], sampling.watermark)
        if sampling.logit_bias:
            for token, bias in sampling.logit_bias:
                logits[token] += bias
        generated = row.tokens[row.prompt_len :]
        if generated and _penalises(sampling):
            ids, counts = np.unique(np.array(generated, np.intp), return_counts=True)
            seen = logits[ids]
            penalty = np.float32(sampling.repetition_penalty)
            seen = np.where(seen > 0, seen / penalty, seen * penalty)
            seen -= (sampling.frequency_penalty * counts).astype(np.float32)
            seen -= np.float32(sampling.presence_penalty)
            logits[ids] = seen
        if len(generated) < sampling.min_tokens:
            stops = [token for token in sampling.stop_tokens if token < self._vocab]
            logits[stops] = _MINUS_INF
        return logits

    def _sample(
        self,
        logits: Floats,
        ids: Ids | None,
        sampling: SamplingParams,
        peak: float,
        chance: float,
    ) -> int:
        """Temperature, filters, draw.

        ``ids`` are the tokens that the logits belong to, None for all; ``peak`` is the largest
        logit.
        """
        if 0 < sampling.top_k < len(logits):
            likeliest = largest(logits, sampling.top_k)
            ids = likeliest if ids is None else ids[likeliest]
            logits = logits[likeliest]
        weights = self._weigh(logits, sampling.temperature, peak)
        kept = keep(weights, sampling)
        if kept is not None:
            ids = kept if ids is None else ids[kept]
            weights = weights[kept]
        elif ids is None:
            return _invert_blocks(self._padded, chance)
        assert ids is not None, "tokens were picked"
        return int(ids[_invert(weights, chance)])

    def _weigh(self, logits: Floats, temperature: float, peak: float) -> Floats:
        """Probabilities up to a factor; the likeliest token weighs 1."""
        weights = self._weights if len(logits) == self._vocab else np.empty_like(logits)
        np.subtract(logits, np.float32(peak), out=weights)
        if temperature != 1.0:
            with np.errstate(over="ignore"):
                np.divide(weights, np.float32(temperature), out=weights)
        return np.exp(weights, out=weights)

    def _logprobs(self, raw: Floats, token: int, top: float, sampling: SamplingParams) -> Logprobs:
        count = sampling.top_logprobs
        weights = self._weigh(raw, 1.0, top)
        log_total = top + math.log(float(weights.sum()))
        ids: list[int] = []
        values: list[float] = []
        if count:
            likeliest = largest(raw, min(count, self._vocab))
            likeliest = likeliest[np.argsort(-raw[likeliest], kind="stable")]
            ids = likeliest.tolist()
            values = [value - log_total for value in raw[likeliest].tolist()]
        rank = int(np.count_nonzero(raw > raw[token])) + 1 if sampling.ranks else 0
        return Logprobs(float(raw[token]) - log_total, ids, values, rank)


def _penalises(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def _adjusts(row: Row) -> bool:
    sampling = row.sampling
    return bool(
        sampling.logit_bias
        or _penalises(sampling)
        or len(row.tokens) - row.prompt_len < sampling.min_tokens
        or sampling.watermark is not None
    )


def _invert(weights: Floats, chance: float) -> int:
    """The first index whose cumulative weight exceeds that share of the total."""
    mass = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(mass, chance * mass[-1], side="right"))
    # Rounding can ask for one behind the end; then the last that has any weight is meant.
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])


def _invert_blocks(weights: Floats, chance: float) -> int:
    """As ``_invert``, in two levels, so that the whole vocabulary is not accumulated."""
    table = weights.reshape(-1, _BLOCK)
    sums = np.add.reduce(table, axis=1)
    mass = np.cumsum(sums, dtype=np.float64)
    wanted = chance * float(mass[-1])
    block = min(int(np.searchsorted(mass, wanted, side="right")), int(np.flatnonzero(sums)[-1]))
    before = float(mass[block - 1]) if block else 0.0
    inner = np.cumsum(table[block], dtype=np.float64)
    index = int(np.searchsorted(inner, wanted - before, side="right"))
    if index == _BLOCK:
        index = int(np.flatnonzero(table[block])[-1])
    return block * _BLOCK + index
