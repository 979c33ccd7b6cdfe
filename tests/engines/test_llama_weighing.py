"""llama.cpp's exponentials, which its engine samples with, beside exact ones."""

import ctypes
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from shards.engines import llama_weighing
from shards.engines.base import SamplingParams
from shards.engines.llama_weighing import weigher
from shards.sampling import Sampler
from shards.weighing import Weigh, weigh
from tests.engines.test_sampling import Row

VOCAB = 49_155


def logits(seed: int, rows: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(3, 4, (rows, VOCAB)).astype(np.float32)


def test_this_build_has_them() -> None:
    """Or the sampler would be slow here, and nobody would notice."""
    assert weigher() is not weigh


@pytest.mark.parametrize("weigh", [weigh, weigher()])
@pytest.mark.parametrize("length", [2, 7, 8, 1021, VOCAB])
def test_exponentials_and_their_sum_are_exact_to_single_precision(
    weigh: Weigh, length: int
) -> None:
    row = logits(1)[0][:length]
    row[length // 2] = -math.inf
    before, peak = row.copy(), float(row.max())
    out = np.empty_like(row)
    total = weigh(row, peak, out)
    exact = np.exp((row - np.float32(peak)).astype(np.float64))
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-37)
    assert total == pytest.approx(exact.sum(), rel=1e-6)
    assert (row == before).all()
    assert weigh(row, peak, row) == total
    assert (row == out).all()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, min_p=0.01, repetition_penalty=1.2),
        SamplingParams(temperature=1.0, top_p=0.95, presence_penalty=0.5, typical_p=0.9),
    ],
)
def test_the_sampler_draws_as_with_numpy(sampling: SamplingParams) -> None:
    """Up to rounding, which moves a draw by a token in some millions."""
    rows = [Row(sampling, [1, *range(5, 25 + n)], 1) for n in range(16)]
    scores = logits(2, len(rows))
    drawn = Sampler(VOCAB, weigh=weigher()).draw(scores, rows)
    assert drawn.tokens == Sampler(VOCAB).draw(scores, rows).tokens
    reversed_ = Sampler(VOCAB, threads=2, weigh=weigher()).draw(scores[::-1], rows[::-1])
    assert drawn.tokens == reversed_.tokens[::-1]


def test_log_probabilities_do_not_tell_who_weighed() -> None:
    sampling = SamplingParams(
        temperature=1.0, top_p=0.9, frequency_penalty=0.3, logprobs=True, top_logprobs=5
    )
    rows = [Row(sampling, [1, *range(5, 25 + n)], 1) for n in range(8)]
    scores = logits(3, len(rows))
    ours = Sampler(VOCAB, weigh=weigher()).draw(scores, rows).logprobs
    theirs = Sampler(VOCAB).draw(scores, rows).logprobs
    for index in range(len(rows)):
        assert ours[index].logprob == pytest.approx(theirs[index].logprob, rel=1e-6)
        assert ours[index].top_tokens == theirs[index].top_tokens


def test_numpy_stands_in_for_a_build_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_weighing, "_soft_max", None)
    assert weigher() is weigh


@pytest.mark.parametrize("spoil", ["sum", "weights"])
def test_numpy_stands_in_for_a_function_that_does_something_else(
    monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    genuine = llama_weighing._soft_max

    def other(count: int, out: int, given: int, peak: float) -> float:
        total: float = genuine(count, out, given, peak)
        if spoil == "weights":
            ctypes.cast(out, ctypes.POINTER(ctypes.c_float))[count - 1] *= 1.001
        return total * (1.001 if spoil == "sum" else 1.0)

    monkeypatch.setattr(llama_weighing, "_soft_max", other)
    assert weigher() is weigh
