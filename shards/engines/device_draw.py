"""What draws on a device have in common, whatever computes them. This module needs no framework."""

import math
from collections.abc import Sequence

from shards.filters import Floats
from shards.sampling import Drawn, Row, Sampler, adjusts

_SPARE_STEPS = 2.0**40
# Shares of a mass have 53 bits, in two parts.
SHARE_BITS, LOW_BITS = 53, 31


def serves(row: Row) -> bool:
    """Whether temperature, top_k, top_p and min_p are all that a row asks for."""
    sampling = row.sampling
    typical = 0.0 < sampling.typical_p < 1.0 and sampling.temperature > 0.0
    return not (typical or adjusts(row) or row.guide is not None)


def spare_share(top_p: float) -> float:
    """The share of the mass that may be left out.

    Rounded up, a little: of 300 equal tokens 0.9 keeps 270, though the nearest number to 0.9 in
    double precision is more than that.
    """
    return math.ceil((1.0 - top_p) * _SPARE_STEPS) / _SPARE_STEPS if 0.0 < top_p < 1.0 else 0.0


def parts(share: float) -> tuple[int, int]:
    """A share, 0 to 1, by its upper 22 bits and its lower 31; the upper ones of 1 are 23."""
    return divmod(int(share * 2.0**SHARE_BITS), 1 << LOW_BITS)


def draw_there(
    sampler: Sampler, logits: Floats, rows: Sequence[Row], there: Sequence[int], drawn: Drawn
) -> None:
    """Draws rows of a step on the host, those of the indices ``there``, by their logits."""
    found = sampler.draw(logits, [rows[index] for index in there])
    for place, index in enumerate(there):
        drawn.tokens[index] = found.tokens[place]
        if place in found.logprobs:
            drawn.logprobs[index] = found.logprobs[place]
        if place in found.failures:
            drawn.failures[index] = found.failures[place]


def unit_bits(vocab_size: int) -> int:
    """So many bits for the likeliest token, that all of them have no more than 62."""
    return 62 - (vocab_size - 1).bit_length()
