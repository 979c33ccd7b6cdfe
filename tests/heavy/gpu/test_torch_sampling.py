"""Tokens that a GPU draws itself: those of the host's sampler, whatever the neighbours.

``ROUNDHOUSE_GPU_TESTS_ON=cpu`` has the processor do the same, without the kernel unless
``TRITON_INTERPRET=1``.
"""

import os

import numpy as np
import pytest
import torch

from shards.engines.torch_trial import trouble
from tests.heavy.drawing import BORDERS, EXCHANGED_PER_THOUSAND, KINDS, random_logits, random_rows
from tests.heavy.torch.drawing import Both, Kernel

DEVICE = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON", "cuda:0")
# Of a small model and a large one; the device has other sorts for each.
SIZES = (2000, 128_256)
WAYS = ["operations", "kernel"]
if not DEVICE.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
    WAYS = ["operations"]


def kernel_of(way: str, size: int) -> Kernel | None:
    if way == "operations":
        return None
    from shards.engines.torch_draw_kernel import DrawKernel

    return DrawKernel(size)


def beside_host(way: str, size: int) -> Both:
    return Both(size, device=DEVICE, kernel=kernel_of(way, size))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_draws_what_the_host_draws(asked: dict[str, object], size: int, way: str) -> None:
    both, random = beside_host(way, size), np.random.default_rng(size)
    count = 100 if size < 10_000 else 6
    spreads, steps = (0.3, 3.0, 8.0), (0.0, 0.125)
    exchanged, rows = both.all_exchanged(random, size, count, spreads, steps, **asked)
    assert not both.brought
    assert exchanged <= 1 + rows * EXCHANGED_PER_THOUSAND / 1000


@pytest.mark.parametrize("count", [1, 6, 64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_the_operations_draw(
    size: int, count: int, dtype: torch.dtype
) -> None:
    """Not a bit differs. Few rows are of each kind in turn, many of all kinds."""
    random, fast = np.random.default_rng(count), beside_host(WAYS[-1], size)
    asked = [*KINDS.values(), *(one for name, one in BORDERS.items() if "told" not in name)]
    rows = [row for one in asked for row in random_rows(random, max(1, count // 16), **one)]
    random.shuffle(rows)  # type: ignore[arg-type]
    plain = beside_host("operations", size)
    for spread, step in ((0.3, 0.0), (2.0, 0.125), (6.0, 0.0)):
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            logits = random_logits(random, len(part), size, spread, step)
            if start % 2:
                logits[random.random(logits.shape) < 0.5] = -np.inf
            placed = torch.from_numpy(logits).to(DEVICE, dtype)
            drawing = fast.here.begin(placed, part)
            tokens = drawing.tokens.tolist()
            drawn = drawing.take()
            assert drawn == plain.here.draw(placed, part)
            if WAYS[-1] == "kernel":
                assert drawing.sure
                assert drawn.tokens == tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_neighbours_change_nothing(size: int, way: str) -> None:
    """Not a bit: also where a row is alone, or one of 64."""
    both, random = beside_host(way, size), np.random.default_rng(1)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 4, **asked)]
    logits = random_logits(random, len(rows), size, 2.0)
    together = both.draw(logits, rows)
    for index in range(0, len(rows), 3):
        alone = both.draw(logits[index : index + 1], [rows[index]])
        assert alone.tokens[0] == together.tokens[index]
        assert alone.logprobs.get(0) == together.logprobs.get(index)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_row_only(bad: float, way: str) -> None:
    both, random = beside_host(way, 2000), np.random.default_rng(2)
    for asked in KINDS.values():
        logits, rows = random_logits(random, 4, 2000, 3.0), random_rows(random, 4, **asked)
        logits[1, 17] = bad
        assert both.exchanged(logits, rows) == 0
        assert list(both.draw(logits, rows).failures) == [1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_trial_at_load_finds_nothing(size: int, dtype: torch.dtype, way: str) -> None:
    both = beside_host(way, size)
    assert trouble(both.here, both.host, size, torch.device(DEVICE), dtype) == ""
