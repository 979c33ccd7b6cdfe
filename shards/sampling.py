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

Filters do not sort the vocabulary. They sort the few tokens above a bound that provably leaves in
all that can survive.

[1] ``generation/utils.py``, ``_get_logits_processor``. [2] Steele et al., OOPSLA 2014,
doi:10.1145/2660193.2660195.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shards.allowed import GuideError, Guiding, holds, pick
from shards.engines.base import Logprobs, SamplingParams
from shards.watermark import mark

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# Weights, the largest being 1, down to which the nucleus is looked for.
_FLOORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)
# Distances of surprise from the entropy, in nats, for typical_p.
_SPREADS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, math.inf)
_BLOCK = 256
_GROUPS = 512
# So few are sorted at once.
_FEW = 2048
_MINUS_INF = np.float32(-np.inf)
_TINY = np.float32(1e-38)


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
        kept = _filter(weights, sampling)
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


def largest(logits: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest, ascending; of equal ones the smaller ids.

    The count-th largest of the maxima of groups bounds the count-th largest of all from below, and
    closely, so that few tokens are looked at twice. A group is every 512th token: that is how numpy
    finds the maxima fastest.
    """
    height = len(logits) // _GROUPS
    near: Ids
    if count <= _GROUPS and height > 1:
        maxima = logits[: height * _GROUPS].reshape(height, _GROUPS).max(axis=0)
        near = np.flatnonzero(logits >= np.partition(maxima, _GROUPS - count)[_GROUPS - count])
    else:
        near = np.arange(len(logits))
    values = logits[near]
    last = np.partition(values, len(values) - count)[len(values) - count]
    return _first(near, values, last, count)


def _first(ids: Ids, values: Floats, last: np.float32, count: int) -> Ids:
    """The ``count`` ids with the largest values, of which ``last`` is the smallest, ascending."""
    chosen = values > last
    equal = np.flatnonzero(values == last)[: count - int(np.count_nonzero(chosen))]
    chosen[equal] = True
    found: Ids = ids[chosen]
    return found


def _filter(weights: Floats, sampling: SamplingParams) -> Ids | None:
    """Indices that top_p, min_p and typical_p leave, ascending; None if none of them is on."""
    kept: Ids | None = None
    if 0.0 < sampling.top_p < 1.0:
        kept = _nucleus(weights, sampling.top_p)
    if sampling.min_p > 0.0:
        # The likeliest token weighs 1, whatever top_p took away.
        floor = np.float32(min(sampling.min_p, 1.0))
        likely = weights >= floor
        kept = np.flatnonzero(likely) if kept is None else kept[likely[kept]]
    if 0.0 < sampling.typical_p < 1.0:
        if kept is None:
            kept = _typical(weights, sampling.typical_p)
        else:
            kept = kept[_typical(weights[kept], sampling.typical_p)]
    return kept


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of likeliest tokens with that share of the mass, ascending."""
    wanted = top_p * float(weights.sum())
    for floor in _FLOORS if len(weights) > _FEW else (0.0,):
        near = np.flatnonzero(weights >= np.float32(floor))
        values = weights[near]
        if floor == 0.0 or float(values.sum()) >= wanted:
            break
    falling = np.sort(values)[::-1]
    last = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), wanted))
    last = min(last, len(falling) - 1)
    return _first(near, values, falling[last], last + 1)


def _typical(weights: Floats, typical_p: float) -> Ids:
    """Indices whose surprise is nearest to the entropy, up to that share of the mass, ascending."""
    total = float(weights.sum())
    # A token without weight gets a large but finite surprise: it must not spoil the entropy.
    surprise = np.log(np.maximum(weights, _TINY))
    np.subtract(np.float32(math.log(total)), surprise, out=surprise)
    entropy = float(np.multiply(weights, surprise).sum()) / total
    distance = np.abs(surprise - np.float32(entropy))
    distance[weights == 0.0] = np.inf
    wanted = typical_p * total
    for spread in _SPREADS:
        near = np.flatnonzero(distance <= np.float32(spread))
        if spread == math.inf or float(weights[near].sum()) >= wanted:
            break
    far = -distance[near]
    order = np.argsort(far)[::-1]
    last = int(np.searchsorted(np.cumsum(weights[near][order], dtype=np.float64), wanted))
    last = min(last, len(order) - 1)
    return _first(near, far, far[order[last]], last + 1)


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
