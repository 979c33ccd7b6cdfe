"""Which tokens top_k, top_p, min_p and typical_p leave of one row; see ``shards.sampling``.

Filters do not sort the vocabulary. They sort the few tokens above a bound that provably leaves in
all that can survive.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

# Weights, the largest being 1, down to which the nucleus is looked for.
_FLOORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)
# Distances of surprise from the entropy, in nats, for typical_p.
_SPREADS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, math.inf)
_GROUPS = 512
# So few are sorted at once. More are narrowed down first, in so many tries: all can be equal.
_FEW = 2048
_NARROWINGS = 24
_STRIDE = 16
_TINY = np.float32(1e-38)


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
    return near[_first(values, last, count)]


def _first(values: Floats, last: np.float32, count: int) -> Ids:
    """Places of the ``count`` largest values, of which ``last`` is the smallest, ascending."""
    chosen = values > last
    equal = np.flatnonzero(values == last)[: count - int(np.count_nonzero(chosen))]
    chosen[equal] = True
    return np.flatnonzero(chosen)


def keep(weights: Floats, sampling: SamplingParams) -> Ids | None:
    """Indices that top_p, min_p and typical_p leave, ascending; None if none of them is on."""
    kept: Ids | None = None
    if 0.0 < sampling.top_p < 1.0:
        kept = nucleus(weights, sampling.top_p)
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


def nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of likeliest tokens with that share of the mass, ascending."""
    wanted = top_p * float(weights.sum())
    high, above, most = math.inf, 0.0, 0
    for floor in _FLOORS if len(weights) > _FEW else (0.0,):
        likely = weights >= np.float32(floor)
        count = int(np.count_nonzero(likely))
        if count > _FEW:
            return _wide_nucleus(weights, wanted, (high, above, most))
        values = weights[likely]
        mass = float(values.sum())
        if floor == 0.0 or mass >= wanted:
            break
        high, above, most = floor, mass, count
    return np.flatnonzero(likely)[_first(values, *_least(values, wanted))]


def _least(values: Floats, wanted: float) -> tuple[np.float32, int]:
    """The smallest of the largest values that sum up to the wanted one, and how many those are."""
    falling = np.sort(values)[::-1]
    place = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), wanted))
    place = min(place, len(falling) - 1)
    return falling[place], place + 1


def _wide_nucleus(weights: Floats, wanted: float, known: tuple[float, float, int]) -> Ids:
    """As ``nucleus`` where many tokens take part, of a flat distribution.

    They are too many to sort, or to copy more than once. The weight of the last one is guessed from
    every 16th token, and narrowed down until few are in question. ``known`` is a weight that is too
    high, with the sum and the number of the tokens that have at least that.
    """
    (high, above, most), low, count = known, 0.0, len(weights)
    sample = weights[::_STRIDE]
    sample = sample[sample < np.float32(high)]
    middle = float(_least(sample, (wanted - above) / _STRIDE)[0])
    step = 1.15
    for _ in range(_NARROWINGS):
        if count - most <= _FEW:
            break
        likely = weights >= np.float32(middle)
        mass, number = float(np.multiply(weights, likely).sum()), int(np.count_nonzero(likely))
        if mass >= wanted:
            low, count = middle, number
        else:
            high, above, most = middle, mass, number
        if low > 0.0 and high < math.inf:
            middle = math.sqrt(low * high)
        else:
            middle, step = (middle * step if low > 0.0 else middle / step), step * step
    band = weights[(weights >= np.float32(low)) & (weights < np.float32(high))]
    last, number = _least(band, wanted - above)
    return _first(weights, last, most + number)


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
    return near[_first(far, far[order[last]], last + 1)]
