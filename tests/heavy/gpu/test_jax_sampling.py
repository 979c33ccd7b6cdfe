"""Tokens that a GPU draws itself with JAX: those of the host's sampler, whatever the neighbours.

``ROUNDHOUSE_GPU_TESTS_ON=cpu`` has the processor do the same.
"""

import os
from functools import cache

import numpy as np
import pytest

from shards.engines.draw_trial import trouble
from tests.heavy.drawing import EXCHANGED_PER_THOUSAND, KINDS, random_logits, random_rows
from tests.heavy.jax.drawing import Both

DEVICE = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON", "gpu")
# Of a small model and a large one.
SIZES = (2000, 128_256)


@cache
def both_of(size: int) -> Both:
    """With few programs: they are compiled once for each size."""
    return Both(size, (1, 100 if size < 10_000 else 16), DEVICE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_draws_what_the_host_draws(asked: dict[str, object], size: int) -> None:
    both, random = both_of(size), np.random.default_rng(size)
    both.brought.clear()
    count = 100 if size < 10_000 else 6
    spreads, steps = (0.3, 3.0, 8.0), (0.0, 0.125)
    exchanged, rows = both.all_exchanged(random, size, count, spreads, steps, **asked)
    assert not both.brought
    assert exchanged <= 1 + rows * EXCHANGED_PER_THOUSAND / 1000


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_change_nothing(size: int) -> None:
    """Not a bit: also where a row is alone, or one of many of all kinds."""
    both, random = both_of(size), np.random.default_rng(1)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 1, **asked)]
    logits = random_logits(random, len(rows), size, 2.0)
    together = both.draw(logits, rows)
    for index in range(len(rows)):
        alone = both.draw(logits[index : index + 1], [rows[index]])
        assert alone.tokens[0] == together.tokens[index]
        assert alone.logprobs.get(0) == together.logprobs.get(index)


@pytest.mark.parametrize("size", SIZES)
def test_the_trial_at_load_finds_nothing(size: int) -> None:
    both = both_of(size)
    assert trouble(both.here.draw_host, both.host, size) == ""
