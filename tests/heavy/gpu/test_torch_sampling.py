"""Tokens that a GPU draws itself: those of the host's sampler, whatever the neighbours.

``ROUNDHOUSE_GPU_TESTS_ON=cpu`` has the processor do the same.
"""

import os

import numpy as np
import pytest
import torch

from shards.engines.torch_trial import trouble
from tests.heavy.drawing import EXCHANGED_PER_THOUSAND, KINDS, random_logits, random_rows
from tests.heavy.torch.drawing import Both

DEVICE = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON", "cuda:0")
# Of a small model and a large one; the device has other sorts for each.
SIZES = (2000, 128_256)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_draws_what_the_host_draws(asked: dict[str, object], size: int) -> None:
    both, random = Both(size, device=DEVICE), np.random.default_rng(size)
    count = 100 if size < 10_000 else 6
    exchanged = rows = 0
    for spread in (0.3, 3.0, 8.0):
        for step in (0.0, 0.125):
            logits = random_logits(random, count, size, spread, step)
            exchanged += both.exchanged(logits, random_rows(random, count, **asked))
            rows += count
    assert not both.brought
    assert exchanged <= 1 + rows * EXCHANGED_PER_THOUSAND / 1000


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_change_nothing(size: int) -> None:
    """Not a bit: also where a row is alone, or one of 64."""
    both, random = Both(size, device=DEVICE), np.random.default_rng(1)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 4, **asked)]
    logits = random_logits(random, len(rows), size, 2.0)
    together = both.draw(logits, rows)
    for index in range(0, len(rows), 3):
        alone = both.draw(logits[index : index + 1], [rows[index]])
        assert alone.tokens[0] == together.tokens[index]
        assert alone.logprobs.get(0) == together.logprobs.get(index)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_row_only(bad: float) -> None:
    both, random = Both(2000, device=DEVICE), np.random.default_rng(2)
    for asked in KINDS.values():
        logits, rows = random_logits(random, 4, 2000, 3.0), random_rows(random, 4, **asked)
        logits[1, 17] = bad
        assert both.exchanged(logits, rows) == 0
        assert list(both.draw(logits, rows).failures) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_trial_at_load_finds_nothing(size: int, dtype: torch.dtype) -> None:
    both = Both(size, device=DEVICE)
    assert trouble(both.here, both.host, size, torch.device(DEVICE), dtype) == ""
