"""Which tokens top_k, top_p, min_p and typical_p leave of one row; see ``shards.sampling``.

Filters do not sort the vocabulary. They sort the few tokens above a bound that leaves in all that
can survive. Where little is left to do with each token, what counts is how often numpy is called,
and by which name: methods skip a microsecond of Python. Long rows are never indexed with a mask:
to look for its places first takes a third of the time, as there are no branches to guess.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_NOTHING: Ids = np.empty(0, np.intp)
# Distances of surprise from the entropy, in nats, for typical_p.
_SPREADS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, math.inf)
_GROUPS = 512
# So few are sorted and summed up as a whole.
_FEW = 2048
# So many times the weight of the likeliest token all of them weigh in a flat distribution.
_FLAT = 6.0
# The nucleus is first looked for down to so many times the weight that certainly leaves it in.
_EAGER = 48.0
# What is left out is guessed from every 61st token, and a share of the mass between what may be
# left out and that guess is for bad luck.
_STRIDE = 61
_CAUTION = 0.8
# A weight may be so much less than the bound it was compared with, in single precision.
_ROUNDING = 1e-6
# Longer runs are summed up in two levels, by blocks.
_BLOCK = 256
_TINY = np.float32(1e-38)
_ONES: Floats = np.ones(_BLOCK, np.float32)
# numpy 1, which some engines' environments have, knows the product of matrices only.
_dot: Callable[[Floats, Floats], Floats] = getattr(np, "vecdot", np.matmul)


class Kept(NamedTuple):
    """What filters leave, ascending, and perhaps others, which weigh 0."""

    ids: Ids
    weights: Floats
    floor: float
    """All tokens that weigh as much are among them."""


def largest(logits: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest, ascending; of equal ones the smaller ids."""
    near = _near(logits, count)
    values = logits[near]
    last = np.partition(values, len(values) - count)[len(values) - count]
    return near[_first(values, last, count)]


def ranked(
    logits: Floats, count: int, likely: Ids, surely: float = math.inf, besides: Ids = _NOTHING
) -> Ids:
    """Ids of the ``count`` largest, the largest first; of equal ones the smaller ids first.

    ``likely`` are different ids, ascending, which may help to find them: the largest should be
    among them. All with logits of ``surely`` and more are, if they are not among ``besides``.
    """
    near: Ids | None = None
    if len(likely) >= count:
        values = logits[likely]
        bound = np.partition(values, len(likely) - count)[len(likely) - count]
        if bound >= surely:
            near = likely[(values >= bound).nonzero()[0]]
            others = besides[(logits[besides] >= bound).nonzero()[0]]
            if len(others):
                near = np.array(sorted({*near.tolist(), *others.tolist()}))
        else:
            near = (logits >= bound).nonzero()[0]
    # A bias can make tokens likely that the engine thought little of.
    if near is None or len(near) > _FEW:
        near = _near(logits, count)
    return near[np.argsort(-logits[near], kind="stable")[:count]]


def _near(logits: Floats, count: int) -> Ids:
    """Ids of the ``count`` largest and perhaps of a few more, ascending.

    The count-th largest of the maxima of groups bounds the count-th largest of all from below, and
    closely, so that few tokens are looked at twice. A group is every 512th token: that is how numpy
    finds the maxima fastest.
    """
    height = len(logits) // _GROUPS
    if count > _GROUPS or height < 2:
        return np.arange(len(logits))
    maxima = logits[: height * _GROUPS].reshape(height, _GROUPS).max(axis=0)
    maxima.partition(_GROUPS - count)
    return np.flatnonzero(logits >= maxima[_GROUPS - count])


def _first(values: Floats, last: np.float32, count: int) -> Ids:
    """Places of the ``count`` largest values, of which ``last`` is the smallest, ascending."""
    return _chosen(values, last, count).nonzero()[0]


def _chosen(values: Floats, last: np.float32, count: int) -> NDArray[np.bool_]:
    """Which are the ``count`` largest values, of which ``last`` is the smallest."""
    chosen = values >= last
    surplus = int(np.count_nonzero(chosen)) - count
    if surplus:
        chosen[(values == last).nonzero()[0][-surplus:]] = False
    return chosen


def keep(weights: Floats, sampling: SamplingParams, total: float) -> Kept | None:
    """What top_p, min_p and typical_p leave; None if none of the filters is on.

    ``total`` is the sum of the weights.
    """
    kept: Kept | None = None
    if 0.0 < sampling.top_p < 1.0:
        kept = nucleus(weights, sampling.top_p, total)
    if sampling.min_p > 0.0:
        # The likeliest token weighs 1, whatever top_p took away.
        floor = np.float32(min(sampling.min_p, 1.0))
        if kept is None:
            ids = np.flatnonzero(weights >= floor)
            kept = Kept(ids, weights[ids], float(floor))
        else:
            np.multiply(kept.weights, kept.weights >= floor, out=kept.weights)
    if 0.0 < sampling.typical_p < 1.0:
        if kept is None:
            ids = _typical(weights, sampling.typical_p, total)
            return Kept(ids, weights[ids], math.inf)
        left = kept.weights.nonzero()[0]
        ids, likely = kept.ids[left], kept.weights[left]
        places = _typical(likely, sampling.typical_p, float(likely.sum()))
        kept = Kept(ids[places], likely[places], math.inf)
    return kept


def nucleus(weights: Floats, top_p: float, total: float) -> Kept:
    """The smallest set of likeliest tokens with that share of the mass.

    There are others among them: to pick out those that are left takes longer than to pass over the
    rest when one is drawn.

    Tokens that weigh less than an even share of what may be left out can all be left out. Mostly
    a higher floor does: one that is much higher, or in flat distributions one that is guessed.
    Whether it did is known from the mass above it.
    """
    wanted = top_p * total
    even = (total - wanted) / len(weights)
    eager = max(even, _guess(weights, total - wanted)) if total > _FLAT else _EAGER * even
    for floor in (eager, even, 0.0):
        ids = (weights >= np.float32(floor)).nonzero()[0]
        values = weights[ids]
        spare = float(np.add.reduce(values, dtype=np.float64)) - wanted
        if spare >= 0.0 or floor == 0.0:
            break
    chosen = _chosen(values, *_border(values, max(spare, 0.0), floor))
    return Kept(ids, np.multiply(values, chosen, out=values), floor)


def _guess(weights: Floats, spare: float) -> float:
    """A weight such that all tokens below it together weigh about what may be left out, or less."""
    sample = weights[::_STRIDE].copy()
    sample.sort()
    return float(sample[min(reach(sample, _CAUTION * spare / _STRIDE), len(sample) - 1)])


def _border(values: Floats, spare: float, floor: float) -> tuple[np.float32, int]:
    """Of the largest values, the rest of which sum up to ``spare`` at most: the smallest, how many.

    At least one value is kept. None is less than ``floor``, up to rounding.
    """
    most = spare / floor if floor > 0.0 else math.inf
    # So many are certainly enough to exceed what is spare.
    enough = int(most * (1.0 + _ROUNDING)) + 2 if most < len(values) / 2 else len(values)
    few = values if enough >= len(values) else np.partition(values, enough - 1)[:enough]
    rising = np.sort(few)
    out = min(reach(rising, spare), len(rising) - 1)
    return rising[out], len(values) - out


def invert(weights: Floats, chance: float) -> int:
    """The first index whose cumulative weight exceeds that share of the total, which is below 1.

    A token without weight is never found, whatever rounding does.
    """
    start = 0
    if len(weights) <= _FEW:
        sums = np.add.accumulate(weights, dtype=np.float64)
        wanted = chance * float(sums[-1])
    else:
        whole = len(weights) // _BLOCK * _BLOCK
        # A product with ones adds up twice as fast as a sum does.
        blocks = _dot(weights[:whole].reshape(-1, _BLOCK), _ONES)
        sums = np.add.accumulate(blocks, dtype=np.float64)
        rest = float(np.add.reduce(weights[whole:]))
        wanted = chance * (float(sums[-1]) + rest)
        block = int(sums.searchsorted(wanted, "right"))
        start = block * _BLOCK
        wanted -= float(sums[block - 1]) if block else 0.0
        weights = weights[start : start + _BLOCK]
        sums = np.add.accumulate(weights, dtype=np.float64)
    index = int(sums.searchsorted(wanted, "right"))
    return start + (index if index < len(weights) else int(weights.nonzero()[0][-1]))


def reach(values: Floats, wanted: float) -> int:
    """The first place where the sum up to it exceeds ``wanted``; their number if it never does.

    Sums are in double precision.
    """
    start, before = 0, 0.0
    if len(values) > _FEW:
        whole = len(values) // _BLOCK * _BLOCK
        blocks = np.add.reduce(values[:whole].reshape(-1, _BLOCK), axis=1, dtype=np.float64)
        sums = np.add.accumulate(blocks)
        block = int(sums.searchsorted(wanted, "right"))
        start, before = block * _BLOCK, float(sums[block - 1]) if block else 0.0
        values = values[start : start + _BLOCK]
    sums = np.add.accumulate(values, dtype=np.float64)
    return start + int(sums.searchsorted(wanted - before, "right"))


def _typical(weights: Floats, typical_p: float, total: float) -> Ids:
    """Indices whose surprise is nearest to the entropy, up to that share of the mass, ascending."""
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
    return near[_first(far, far[order[last]], last + 1)]
