"""The tokens that a constraint allows, and their logits: the sampler's part of a constraint."""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]
Words = NDArray[np.uint32]
"""A bit for each token, the lowest first: whether it may be drawn."""

# Of a vocabulary, one part in so many may be allowed for its tokens to be looked at one by one.
_SPARSE = 16
_MINUS_INF = np.float32(-np.inf)
# numpy 1, which some engines' environments have, does not count bits.
_ones: Callable[[Words], NDArray[np.uint8]] = getattr(
    np, "bitwise_count", lambda words: np.unpackbits(words.view(np.uint8))
)


class GuideError(Exception):
    """A sequence cannot go on under its constraint; the text is one line."""


class Guiding(Protocol):
    """What the sampler needs of a constraint."""

    def allowed(self) -> Words:
        """The tokens that may be drawn now. Raises ``GuideError``."""


def holds(words: Words, token: int) -> bool:
    """Whether a token is allowed."""
    return bool(int(words[token >> 5]) >> (token & 31) & 1)


def pick(
    logits: Floats, words: Words, best: int, scratch: Floats
) -> tuple[Floats, Ids | None, int]:
    """The logits of the tokens that are allowed, their ids, and where the largest of them is.

    Few are picked out, with their ids, ascending; else the logits of all others become -inf, in
    ``scratch``, which may be ``logits`` itself, and the ids are None. ``best`` is where the largest
    of all is. Raises ``GuideError`` if nothing is left.
    """
    count = int(_ones(words).sum())
    ids: Ids | None = None
    if count * _SPARSE <= len(logits):
        ids = members(words)
        logits = logits[ids]
        best = int(logits.argmax()) if count else 0
    else:
        bits = np.unpackbits(words.view(np.uint8), count=len(logits), bitorder="little")
        if logits is not scratch:
            np.copyto(scratch, logits)
        np.copyto(scratch, _MINUS_INF, where=bits == 0)
        logits = scratch
        best = best if bits[best] else int(logits.argmax())
    if not count or not math.isfinite(logits[best]):
        raise GuideError("the constraint, bias and penalties leave no token to draw")
    return logits, ids, best


def members(words: Words) -> Ids:
    """The ids that are allowed, ascending; only words with any bit are unpacked."""
    places = np.flatnonzero(words)
    bits = np.unpackbits(words[places].view(np.uint8), bitorder="little").reshape(-1, 32)
    rows, columns = np.nonzero(bits)
    found: Ids = places[rows] * 32 + columns
    return found
