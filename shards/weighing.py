"""Exponentials of a row of logits: the one thing in the sampler that costs more than reading it."""

from collections.abc import Callable

import numpy as np

from shards.filters import Floats

Weigh = Callable[[Floats, float, Floats], float]
"""Fills the third argument with the exponentials of the first one's numbers, each less the second,
which none exceeds by much; returns their sum.

It makes of a row the same whatever else there is. The arrays are single rows without gaps, and may
be the same one. An engine may have a quicker way than numpy's.
"""


def weigh(logits: Floats, peak: float, out: Floats) -> float:
    """See ``Weigh``."""
    np.subtract(logits, np.float32(peak), out=out)
    return float(np.add.reduce(np.exp(out, out=out)))
