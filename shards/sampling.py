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
from shards.changes import Change, change_of, penalises, penalties
from shards.crew import Crew, default_threads
from shards.engines.base import Logprobs, SamplingParams
from shards.filters import Floats, Ids, invert, keep, largest, ranked
from shards.tally import Tallies, Tally
from shards.watermark import mark
from shards.weighing import Weigh, weigh

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NOTHING: Ids = np.empty(0, np.intp)
NOT_FINITE = "the engine's logits are not finite numbers"
# If changes leave less of the sum of all weights, what they took spoils its last digits.
_TRUSTED = 0.1
# Rounding of a weight, and more than that.
_ROUNDING = 1e-5


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
    """One token per row; what was asked for beside it, and faults, by index of the row.

    It is a ``Drawing`` (``shards.engines.caller``) that is done.
    """

    tokens: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """See ``Drawing``."""
        return True

    def wait(self) -> None:
        """See ``Drawing``."""

    def take(self) -> "Drawn":
        """See ``Drawing``."""
        return self


def splitmix64(value: int) -> int:
    """Scatters 64 bits, a bijection."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def mixed(seed: int, position: int) -> int:
    """64 random bits, a function of its arguments alone."""
    return splitmix64(splitmix64(seed & _MASK) ^ position)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone."""
    return (mixed(seed, position) >> 11) * 2.0**-53


@dataclass(slots=True)
class _Step:
    """One draw of all rows. The last two are by index of the row, for some of them."""

    logits: Floats
    rows: Sequence[Row]
    drawn: Drawn
    tallies: dict[int, Tally] = field(default_factory=dict)
    changes: dict[int, Change] = field(default_factory=dict)


class Sampler:
    """Draws tokens for one engine. Holds scratch memory, so it serves one thread.

    That may have others help it, ``threads`` in all; None: as many as the machine's cores suggest.
    What is drawn does not depend on their number.
    """

    def __init__(self, vocab_size: int, threads: int | None = None, weigh: Weigh = weigh) -> None:
        self._tallies = Tallies()
        self._crew = Crew(default_threads() if threads is None else threads)
        self._desks = [_Desk(vocab_size, weigh) for _ in range(self._crew.threads)]

    def draw(self, logits: Floats, rows: Sequence[Row]) -> Drawn:
        """One token for each row of ``logits`` [rows, vocabulary], which are not changed.

        A row whose logits are not finite gets token 0 and an entry in ``failures``.
        """
        self._tallies.turn()
        if all([row.plain for row in rows]):  # noqa: C419 - a list is made in one call
            drawn = Drawn(logits.argmax(axis=1).tolist())
            for index, best in enumerate(drawn.tokens):
                if not math.isfinite(logits.item(index, best)):
                    _fail(drawn, index, NOT_FINITE)
            return drawn
        step = _Step(logits, rows, Drawn([0] * len(rows)))
        self._count(step)

        def work(member: int, places: Sequence[int]) -> None:
            """Each place of ``drawn`` is written by one member."""
            for index in places:
                self._desks[member].draw(step, index)

        # A guide belongs to the engine's thread.
        guided = [index for index, row in enumerate(rows) if row.guide is not None]
        free = [index for index, row in enumerate(rows) if row.guide is None]
        self._crew.deal(work, free, guided)
        return step.drawn

    def _count(self, step: _Step) -> None:
        """Counts the tokens of penalised rows, and finds their changes if there are no others."""
        rows, tallies = step.rows, step.tallies
        for index, row in enumerate(rows):
            if penalises(row.sampling):
                tallies[index] = self._tallies.of(row)
        alone = [index for index in tallies if not _adjusts_otherwise(rows[index])]
        if alone:
            asked = [rows[index].sampling for index in alone]
            counted = [tallies[index] for index in alone]
            changes = penalties(step.logits, alone, asked, counted)
            step.changes.update(zip(alone, changes, strict=True))

    def close(self) -> None:
        """Ends the threads that help; may be called again."""
        self._crew.close()


@dataclass(slots=True)
class _Scores:
    """The logits that a token is drawn by, and what is known of them."""

    logits: Floats
    best: int
    """Where the largest is."""
    peak: float
    """The largest."""
    change: Change | None = None
    """What the logits are still without."""
    ids: Ids | None = None
    """The tokens that the logits belong to; None for all."""
    raw: bool = True
    """Whether the logits are the engine's own."""
    total: float | None = None
    """The sum of the exponentials of the engine's logits, less their largest, once it is known."""
    likely: Ids = field(default_factory=lambda: _NOTHING)
    """Likely tokens, ascending, if some are known."""
    surely: float = math.inf
    """All tokens with engine's logits of so much are among them, up to those that change."""


class _NoTokenError(Exception):
    """Nothing is left to draw."""


class _Desk:
    """The scratch memory of one thread, and the row that it draws."""

    def __init__(self, vocab_size: int, weigh: Weigh) -> None:
        self._vocab = vocab_size
        self._weigh = weigh
        self._weights: Floats = np.empty(vocab_size, np.float32)
        self._adjusted: Floats = np.empty(vocab_size, np.float32)

    def draw(self, step: _Step, index: int) -> None:
        """Fills in the place of one row. Its logits stay in the cache from one pass to the next."""
        raw, row, drawn = step.logits[index], step.rows[index], step.drawn
        best = drawn.tokens[index] = int(raw.argmax())
        top = float(raw[best])
        # NaN counts as the largest value, so the largest tells.
        if not math.isfinite(top):
            _fail(drawn, index, NOT_FINITE)
        elif not row.plain:
            scores = _Scores(raw, best, top)
            try:
                token = drawn.tokens[index] = self._token(scores, step, index)
            except (GuideError, _NoTokenError) as error:
                _fail(drawn, index, str(error))
                return
            if row.sampling.logprobs:
                if scores.total is None:
                    scores.total = self._weigh(raw, top, self._weights)
                log_total = top + math.log(scores.total)
                drawn.logprobs[index] = _logprobs(raw, token, log_total, row.sampling, scores)

    def _token(self, scores: _Scores, step: _Step, index: int) -> int:
        """The token that is drawn. Raises ``GuideError`` and ``_NoTokenError``."""
        row = step.rows[index]
        if index in step.tallies or _adjusts_otherwise(row):
            self._adjust(scores, step, index)
        if row.guide is not None:
            self._guide(scores, row.guide, row.sampling)
        if row.sampling.temperature > 0.0:
            chance = uniform(row.sampling.seed, len(row.tokens))
            return self._sample(scores, row.sampling, chance)
        return scores.best if scores.ids is None else int(scores.ids[scores.best])

    def _adjust(self, scores: _Scores, step: _Step, index: int) -> None:
        """Applies watermark, bias, penalties and the mask of min_tokens.

        Mostly few logits change, and none exceeds the largest. Then the row is not copied: it is
        enough to put right what these few weigh, or nothing at all if the largest stays what it is
        and is all that is wanted.
        """
        row, sampling = step.rows[index], step.rows[index].sampling
        if sampling.watermark is not None:
            np.copyto(self._adjusted, scores.logits)
            mark(self._adjusted, row.tokens[-1], sampling.watermark)
            scores.logits, scores.raw = self._adjusted, False
        change = step.changes.get(index)
        if change is None:
            generated = len(row.tokens) - row.prompt_len
            change = change_of(scores.logits, sampling, generated, step.tallies.get(index))
        picks = row.guide is not None or 0 < sampling.top_k < self._vocab
        if not picks and scores.raw and _spares_copy(change, scores.peak, sampling):
            scores.change = change
        else:
            self._apply(scores, change)

    def _apply(self, scores: _Scores, change: Change) -> None:
        """Copies the row and changes it. Raises ``_NoTokenError``."""
        adjusted = self._adjusted
        if scores.raw:
            np.copyto(adjusted, scores.logits)
        adjusted[change.ids] = change.after
        scores.logits, scores.raw, scores.change = adjusted, False, None
        scores.best = int(adjusted.argmax())
        scores.peak = float(adjusted[scores.best])
        if not math.isfinite(scores.peak):
            raise _NoTokenError("bias, penalties and min_tokens leave no token to draw")

    def _guide(self, scores: _Scores, guide: Guiding, sampling: SamplingParams) -> None:
        """Applies a constraint. Raises ``GuideError``."""
        words = guide.allowed()
        if sampling.temperature > 0.0 or not holds(words, scores.best):
            picked = pick(scores.logits, words, scores.best, self._adjusted)
            scores.logits, scores.ids, scores.best = picked
            scores.raw = False
        scores.peak = float(scores.logits[scores.best])

    def _sample(self, scores: _Scores, sampling: SamplingParams, chance: float) -> int:
        """Temperature, filters, draw."""
        if 0 < sampling.top_k < len(scores.logits):
            likeliest = largest(scores.logits, sampling.top_k)
            scores.ids = likeliest if scores.ids is None else scores.ids[likeliest]
            scores.logits, scores.raw = scores.logits[likeliest], False
        weights, total = self._weighed(scores, sampling.temperature)
        kept = keep(weights, sampling, total)
        if kept is None:
            place = invert(weights, chance)
        else:
            place = int(kept.ids[invert(kept.weights, chance)])
        if scores.ids is not None:
            return int(scores.ids[place])
        if kept is not None:
            scores.likely = kept.ids
            if scores.raw:
                scores.surely = _logit_of(kept.floor, scores.peak, sampling.temperature)
        return place

    def _weighed(self, scores: _Scores, temperature: float) -> tuple[Floats, float]:
        """Probabilities up to a factor, and their sum. Raises ``_NoTokenError``.

        The token with the largest logit weighs 1, unless a change takes that from it.
        """
        logits, weights, change = scores.logits, self._weights, scores.change
        if len(logits) < self._vocab:
            weights = _scaled(logits, scores.peak, temperature, np.empty_like(logits))
            return weights, weigh(weights, 0.0, weights)
        if temperature == 1.0:
            total = self._weigh(logits, scores.peak, weights)
            if scores.raw:
                scores.total = total
        else:
            _scaled(logits, scores.peak, temperature, weights)
            total = self._weigh(weights, 0.0, weights)
        if change is None:
            return weights, total
        few = _scaled(change.after, scores.peak, temperature, np.empty_like(change.after))
        np.exp(few, out=few)
        rest = total + float(np.add.reduce(few - weights[change.ids], dtype=np.float64))
        if rest < _TRUSTED * total:
            self._apply(scores, change)
            return self._weighed(scores, temperature)
        weights[change.ids] = few
        return weights, rest


def _spares_copy(change: Change, peak: float, sampling: SamplingParams) -> bool:
    """Whether it is enough to know the change beside the row, whose largest logit is ``peak``."""
    if not len(change.ids):
        return True
    highest = float(np.maximum.reduce(change.after))
    if sampling.temperature > 0.0 and sampling.min_p == 0.0:
        return highest <= peak
    # It matters which token has the largest logit then.
    return highest < peak and bool(np.maximum.reduce(change.before) < peak)


def _logit_of(weight: float, peak: float, temperature: float) -> float:
    """A logit such that all from there on weigh at least so much."""
    if not 0.0 < weight < math.inf:
        return math.inf
    nats = math.log(weight)
    return peak + temperature * nats + _ROUNDING * (abs(peak) + temperature * (1.0 + abs(nats)))


def _scaled(logits: Floats, peak: float, temperature: float, out: Floats) -> Floats:
    """Logits whose largest is 0, at a temperature."""
    np.subtract(logits, np.float32(peak), out=out)
    if temperature != 1.0:
        with np.errstate(over="ignore"):
            np.divide(out, np.float32(temperature), out=out)
    return out


def _fail(drawn: Drawn, index: int, message: str) -> None:
    drawn.tokens[index] = 0
    drawn.failures[index] = message


def _logprobs(
    raw: Floats, token: int, log_total: float, sampling: SamplingParams, scores: _Scores
) -> Logprobs:
    ids: list[int] = []
    values: list[float] = []
    if sampling.top_logprobs:
        count = min(sampling.top_logprobs, len(raw))
        changed = _NOTHING if scores.change is None else scores.change.ids
        likeliest = ranked(raw, count, scores.likely, scores.surely, changed)
        ids = likeliest.tolist()
        values = [value - log_total for value in raw[likeliest].tolist()]
    rank = int(np.count_nonzero(raw > raw[token])) + 1 if sampling.ranks else 0
    return Logprobs(float(raw[token]) - log_total, ids, values, rank)


def adjusts(row: Row) -> bool:
    """Whether something changes the logits before they are drawn from, constraints apart."""
    return penalises(row.sampling) or _adjusts_otherwise(row)


def _adjusts_otherwise(row: Row) -> bool:
    sampling = row.sampling
    return bool(
        sampling.logit_bias
        or len(row.tokens) - row.prompt_len < sampling.min_tokens
        or sampling.watermark is not None
    )
