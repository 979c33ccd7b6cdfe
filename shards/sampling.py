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
from typing import NamedTuple, Protocol

import numpy as np

from shards.allowed import GuideError, Guiding, holds, pick
from shards.crew import Crew, default_threads
from shards.engines.base import Logprobs, SamplingParams
from shards.filters import Floats, Ids, keep, largest, ranked, reach
from shards.tally import Tallies, Tally
from shards.watermark import mark

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256
_MINUS_INF = np.float32(-np.inf)
_NOTHING: Ids = np.empty(0, np.intp)
NOT_FINITE = "the engine's logits are not finite numbers"
# The tokens that were not changed must have this share of a sum that is to be put right.
_TRUSTED = 0.5
# By so many nats the largest raw logit may exceed the largest one for the same purpose.
_NEAR = 50.0


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
    """Draws tokens for one engine. Holds scratch memory, so it serves one thread.

    That may have others help it, ``threads`` in all; None: as many as the machine's cores suggest.
    What is drawn does not depend on their number.
    """

    def __init__(self, vocab_size: int, threads: int | None = None) -> None:
        self._tallies = Tallies()
        self._crew = Crew(default_threads() if threads is None else threads)
        self._desks = [_Desk(vocab_size) for _ in range(self._crew.threads)]

    def draw(self, logits: Floats, rows: Sequence[Row]) -> Drawn:
        """One token for each row of ``logits`` [rows, vocabulary], which are not changed.

        A row whose logits are not finite gets token 0 and an entry in ``failures``.
        """
        self._tallies.turn()
        if all(row.plain for row in rows):
            best: Ids = logits.argmax(axis=1)
            tops: list[float] = logits[np.arange(len(best)), best].tolist()
            drawn = Drawn(best.tolist())
            for index, top in enumerate(tops):
                if not math.isfinite(top):
                    _fail(drawn, index, NOT_FINITE)
            return drawn
        drawn = Drawn([0] * len(rows))
        tallies = [self._tallies.of(row) if _penalises(row.sampling) else None for row in rows]

        def work(member: int, places: Sequence[int]) -> None:
            """Each place of ``drawn`` is written by one member."""
            for index in places:
                self._desks[member].draw(logits[index], rows[index], tallies[index], drawn, index)

        # A guide belongs to the engine's thread.
        guided = [index for index, row in enumerate(rows) if row.guide is not None]
        free = [index for index, row in enumerate(rows) if row.guide is None]
        self._crew.deal(work, free, guided)
        return drawn

    def close(self) -> None:
        """Ends the threads that help; may be called again."""
        self._crew.close()


class _Change(NamedTuple):
    """New logits of some tokens, each of which is there once."""

    ids: Ids
    before: Floats
    after: Floats


_NO_CHANGE = _Change(_NOTHING, np.empty(0, np.float32), np.empty(0, np.float32))


@dataclass(slots=True)
class _Scores:
    """The logits that a token is drawn by, and what is known of them."""

    logits: Floats
    best: int
    """Where the largest is."""
    peak: float
    """The largest."""
    change: _Change | None = _NO_CHANGE
    """Where they are not what the engine said; None if they may be anything."""
    pending: bool = False
    """Whether ``logits`` are still without the change, which spares their largest."""
    ids: Ids | None = None
    """The tokens that the logits belong to; None for all."""
    likely: Ids = field(default_factory=lambda: _NOTHING)
    """Likely tokens, if some are known."""


class _Desk:
    """The scratch memory of one thread, and the row that it draws."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        blocks = -(-vocab_size // _BLOCK)
        self._padded: Floats = np.zeros(blocks * _BLOCK, np.float32)
        self._weights = self._padded[:vocab_size]
        self._adjusted: Floats = np.empty(vocab_size, np.float32)
        # The sum of the weights, where they also tell the sum of the raw logits' exponentials.
        self._total: float | None = None

    def draw(self, raw: Floats, row: Row, tally: Tally | None, drawn: Drawn, index: int) -> None:
        """Fills in the place of one row. Its logits stay in the cache from one pass to the next.

        ``tally`` is there if the row is penalised.
        """
        token = drawn.tokens[index] = int(raw.argmax())
        top = float(raw[token])
        # NaN counts as the largest value, so the largest tells.
        if not math.isfinite(top):
            _fail(drawn, index, NOT_FINITE)
        elif not row.plain:
            self._draw(_Scores(raw, token, top), row, tally, drawn, index)

    def _draw(
        self, scores: _Scores, row: Row, tally: Tally | None, drawn: Drawn, index: int
    ) -> None:
        sampling, raw, top = row.sampling, scores.logits, scores.peak
        if adjusts(row):
            self._adjust(scores, row, tally)
            if not math.isfinite(scores.peak):
                _fail(drawn, index, "bias, penalties and min_tokens leave no token to draw")
                return
        if row.guide is not None:
            try:
                self._guide(scores, row.guide, sampling)
            except GuideError as error:
                _fail(drawn, index, str(error))
                return
        token = scores.best
        self._total = None
        if sampling.temperature > 0.0:
            token = self._sample(scores, sampling, uniform(sampling.seed, len(row.tokens)))
        elif scores.ids is not None:
            token = int(scores.ids[token])
        drawn.tokens[index] = token
        if sampling.logprobs:
            log_total = self._log_total(raw, top, scores)
            # Where anything may have been forbidden, the engine's likeliest may be anywhere.
            likely = _NOTHING if scores.change is None else scores.likely
            drawn.logprobs[index] = _logprobs(raw, token, log_total, sampling, likely)

    def _adjust(self, scores: _Scores, row: Row, tally: Tally | None) -> None:
        """Applies watermark, bias, penalties and the mask of min_tokens.

        Mostly few logits change, and the largest stays what it is. Then the row is not copied: it
        is enough to weigh those few by themselves.
        """
        adjusted, sampling = self._adjusted, row.sampling
        marked = sampling.watermark is not None
        if sampling.watermark is not None:
            np.copyto(adjusted, scores.logits)
            mark(adjusted, row.tokens[-1], sampling.watermark)
            scores.logits = adjusted
        change = self._change(scores.logits, row, tally)
        scores.change = None if marked else change
        picks = row.guide is not None or 0 < sampling.top_k < self._vocab
        if not marked and not picks and _below(change, scores.peak):
            scores.pending = True
            return
        if not marked:
            np.copyto(adjusted, scores.logits)
        adjusted[change.ids] = change.after
        scores.logits, scores.best = adjusted, int(adjusted.argmax())
        scores.peak = float(adjusted[scores.best])

    def _change(self, logits: Floats, row: Row, tally: Tally | None) -> _Change:
        """What bias, penalties and the mask of min_tokens make of some logits."""
        sampling = row.sampling
        biased = [token for token, _ in sampling.logit_bias]
        stops: list[int] = []
        if len(row.tokens) - row.prompt_len < sampling.min_tokens:
            stops = [token for token in sampling.stop_tokens if token < self._vocab]
        ids = seen = _NOTHING if tally is None else tally.ids
        places: Ids | slice = slice(None)
        if biased or stops:
            ids = np.unique(np.concatenate((seen, np.array(biased + stops, np.intp))))
            places = ids.searchsorted(seen)
        before = logits[ids]
        after = before.copy()
        if biased:
            bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
            np.add.at(after, ids.searchsorted(biased), bias)
        if tally is not None:
            after[places] = _penalised(after[places], tally, sampling)
        if stops:
            after[ids.searchsorted(stops)] = _MINUS_INF
        return _Change(ids, before, after)

    def _guide(self, scores: _Scores, guide: Guiding, sampling: SamplingParams) -> None:
        """Applies a constraint. Raises ``GuideError``."""
        words = guide.allowed()
        if sampling.temperature > 0.0 or not holds(words, scores.best):
            picked = pick(scores.logits, words, scores.best, self._adjusted)
            scores.logits, scores.ids, scores.best = picked
            scores.change = None
        scores.peak = float(scores.logits[scores.best])

    def _sample(self, scores: _Scores, sampling: SamplingParams, chance: float) -> int:
        """Temperature, filters, draw."""
        logits, ids = scores.logits, scores.ids
        if 0 < sampling.top_k < len(logits):
            likeliest = largest(logits, sampling.top_k)
            ids = likeliest if ids is None else ids[likeliest]
            logits = logits[likeliest]
        weights = self._weights if len(logits) == self._vocab else np.empty_like(logits)
        _weigh(logits, sampling.temperature, scores.peak, weights)
        if scores.pending and scores.change is not None:
            few = scores.change.after
            _weigh(few, sampling.temperature, scores.peak, few)
            weights[scores.change.ids] = few
        raw_too = sampling.logprobs and sampling.temperature == 1.0 and len(weights) == self._vocab
        total = 0.0
        if raw_too or sampling.top_p < 1.0 or sampling.typical_p < 1.0:
            total = float(weights.sum())
        self._total = total if raw_too else None
        kept = keep(weights, sampling, total)
        if kept is not None:
            ids, weights = kept[0] if ids is None else ids[kept[0]], kept[1]
        elif ids is None:
            return _invert_blocks(self._padded, chance)
        assert ids is not None, "tokens were picked"
        scores.likely = ids
        return int(ids[_invert(weights, chance)])

    def _log_total(self, raw: Floats, top: float, scores: _Scores) -> float:
        """The logarithm of the sum of the exponentials of the raw logits.

        If all tokens have just been weighed at temperature 1, that is the sum of their weights, up
        to those that were changed. They are put right in it, unless they were most of it, or the
        raw logits are on another scale.
        """
        change, peak = scores.change, scores.peak
        if self._total is not None and change is not None and top - peak <= _NEAR:
            if not len(change.ids):
                return peak + math.log(self._total)
            other = self._total - float(np.add.reduce(self._weights[change.ids], dtype=np.float64))
            if other >= _TRUSTED * self._total:
                before = np.exp(change.before - np.float32(peak))
                return peak + math.log(other + float(np.add.reduce(before)))
        return top + math.log(float(_weigh(raw, 1.0, top, self._weights).sum()))


def _below(change: _Change, peak: float) -> bool:
    """Whether the largest logit is not among those that change, and stays the largest."""
    return not len(change.ids) or bool(np.maximum(change.before, change.after).max() < peak)


def _weigh(logits: Floats, temperature: float, peak: float, out: Floats) -> Floats:
    """Probabilities up to a factor; the likeliest token weighs 1."""
    np.subtract(logits, np.float32(peak), out=out)
    if temperature != 1.0:
        with np.errstate(over="ignore"):
            np.divide(out, np.float32(temperature), out=out)
    return np.exp(out, out=out)


def _fail(drawn: Drawn, index: int, message: str) -> None:
    drawn.tokens[index] = 0
    drawn.failures[index] = message


def _logprobs(
    raw: Floats, token: int, log_total: float, sampling: SamplingParams, likely: Ids
) -> Logprobs:
    ids: list[int] = []
    values: list[float] = []
    if sampling.top_logprobs:
        likeliest = ranked(raw, min(sampling.top_logprobs, len(raw)), likely)
        ids = likeliest.tolist()
        values = [value - log_total for value in raw[likeliest].tolist()]
    rank = int(np.count_nonzero(raw > raw[token])) + 1 if sampling.ranks else 0
    return Logprobs(float(raw[token]) - log_total, ids, values, rank)


def _penalised(seen: Floats, tally: Tally, sampling: SamplingParams) -> Floats:
    """The logits of the generated tokens, lowered."""
    if sampling.repetition_penalty != 1.0:
        penalty = np.float32(sampling.repetition_penalty)
        seen = np.where(seen > 0, seen / penalty, seen * penalty)
    lowered = (sampling.frequency_penalty * tally.often).astype(np.float32)
    return seen - lowered - np.float32(sampling.presence_penalty)


def _penalises(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def adjusts(row: Row) -> bool:
    """Whether something changes the logits before they are drawn from, constraints apart."""
    sampling = row.sampling
    return bool(
        sampling.logit_bias
        or _penalises(sampling)
        or len(row.tokens) - row.prompt_len < sampling.min_tokens
        or sampling.watermark is not None
    )


def _invert(weights: Floats, chance: float) -> int:
    """The first index whose cumulative weight exceeds that share of the total."""
    index = reach(weights, chance, share=True)
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
