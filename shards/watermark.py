"""Text that can be recognised: the soft watermark of Kirchenbauer et al. (arXiv:2301.10226).

The token before decides which tokens are green, a share ``gamma`` of the vocabulary, and ``delta``
is added to their logits. So marked text has more green tokens than chance gives it, and whoever
knows the key can count them, without the model. A token is green behind another one if

    splitmix64(splitmix64(splitmix64(key) ^ previous) ^ token) < gamma * 2**64

with splitmix64 as in ``shards.sampling``. The paper draws a list of exactly that share from a
generator seeded with the token before. Here each token is decided by itself, with that probability:
the same on every machine and library, with the same statistics, and a detector need not know how
large the vocabulary is. There is no state: a sequence that goes on elsewhere keeps its mark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import Watermark

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mark(logits: NDArray[np.float32], previous: int, watermark: Watermark) -> None:
    """Adds delta to the logits [vocabulary] of the tokens that are green behind ``previous``."""
    chosen = _green(watermark, np.array([previous], np.uint64), _all_tokens(len(logits)))
    # Adding 0 to the others is faster than to skip them.
    logits += chosen * np.float32(watermark.delta)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a mark: of ``scored`` different pairs of tokens ``green`` end in a green one.

    ``z`` is by how many standard deviations that is more than text without the mark has on average;
    0.0 if nothing could be scored.
    """

    scored: int
    green: int
    z: float

    @property
    def chance(self) -> float:
        """How likely text without the mark has such a ``z``, or a larger one."""
        return math.erfc(self.z / math.sqrt(2.0)) / 2.0


def detect(tokens: Sequence[int], watermark: Watermark) -> Evidence:
    """Looks for a mark in a sequence of tokens; ``watermark.delta`` does not matter.

    The first token cannot be scored. A pair that comes again counts once: it says nothing new, and
    text that repeats itself would seem to be marked, or not to be, by the luck of a few pairs.
    """
    if len(tokens) < 2:
        return Evidence(0, 0, 0.0)
    ids = np.array(tokens, np.uint64)
    pairs = np.unique(np.stack((ids[:-1], ids[1:])), axis=1)
    scored = pairs.shape[1]
    green = int(np.count_nonzero(_green(watermark, pairs[0], pairs[1])))
    share = watermark.gamma
    deviation = math.sqrt(scored * share * (1.0 - share))
    return Evidence(scored, green, (green - share * scored) / deviation)


def is_green(previous: int, token: int, watermark: Watermark) -> bool:
    """Whether a token is green behind another one."""
    pair = np.array([[previous], [token]], np.uint64)
    return bool(_green(watermark, pair[0], pair[1])[0])


def _green(watermark: Watermark, previous: Hashes, tokens: Hashes) -> NDArray[np.bool_]:
    """Which tokens are green behind the ones before them, each its own, or one for all."""
    seeds = _scatter(_scatter(np.array([watermark.key], np.uint64)) ^ previous)
    limit = np.uint64(math.floor(watermark.gamma * 2.0**64))
    chosen: NDArray[np.bool_] = _scatter(seeds ^ tokens) < limit
    return chosen


def _scatter(values: Hashes) -> Hashes:
    """``sampling.splitmix64`` of each value; takes the place of the values."""
    values += _GOLDEN
    shifted = values >> np.uint64(30)
    values ^= shifted
    values *= _FIRST
    values ^= np.right_shift(values, np.uint64(27), out=shifted)
    values *= _SECOND
    values ^= np.right_shift(values, np.uint64(31), out=shifted)
    return values


@lru_cache(maxsize=2)
def _all_tokens(count: int) -> Hashes:
    return np.arange(count, dtype=np.uint64)
