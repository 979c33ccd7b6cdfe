"""The filters and the draw beside slow, clear ones that sort everything."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.filters import invert, largest, nucleus, ranked
from tests.engines.test_sampling import VOCAB, noise


@given(
    seed=st.integers(0, 10_000),
    count=st.one_of(st.integers(1, 3), st.integers(1, VOCAB)),
    levels=st.sampled_from([2, 9, 0]),
)
def test_largest_is_as_sorting(seed: int, count: int, levels: int) -> None:
    logits = noise(seed, 5.0)
    if levels:
        logits = np.round(logits / 10 * levels).astype(np.float32)
    expected = np.sort(np.lexsort((np.arange(VOCAB), -logits))[:count])
    assert largest(logits, count).tolist() == expected.tolist()


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 40),
    levels=st.sampled_from([2, 9, 0]),
    hints=st.sampled_from([0, 3, 60, VOCAB]),
)
def test_ranked_is_as_sorting_whatever_seemed_likely(
    seed: int, count: int, levels: int, hints: int
) -> None:
    logits = noise(seed, 5.0)
    if levels:
        logits = np.round(logits / 10 * levels).astype(np.float32)
    likely = np.sort(np.random.default_rng(seed).permutation(VOCAB)[:hints])
    expected = np.lexsort((np.arange(VOCAB), -logits))[:count]
    assert ranked(logits, count, likely).tolist() == expected.tolist()


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 20),
    levels=st.sampled_from([2, 9, 0]),
    surely=st.sampled_from([-math.inf, -3.0, 6.0, 12.0]),
)
def test_ranked_is_as_sorting_where_all_likely_tokens_are_known_but_those_that_changed(
    seed: int, count: int, levels: int, surely: float
) -> None:
    logits = noise(seed, 5.0)
    if levels:
        logits = np.round(logits / 10 * levels).astype(np.float32)
    random = np.random.default_rng(seed)
    changed = random.permutation(VOCAB)[: random.integers(0, 200)]
    known = logits >= surely
    known[changed] = random.random(len(changed)) < 0.5
    likely = np.flatnonzero(known)
    expected = np.lexsort((np.arange(VOCAB), -logits))[:count]
    assert ranked(logits, count, likely, surely, changed).tolist() == expected.tolist()


def test_ranking_looks_at_likely_tokens_only_where_they_are_known() -> None:
    logits = np.random.default_rng(3).permutation(40_000).astype(np.float32)
    likely = np.flatnonzero(logits >= 39_000)
    # What is not looked at may be anything.
    logits[logits < 39_000] = math.inf
    assert logits[ranked(logits, 3, likely, 39_500.0)].tolist() == [39_999, 39_998, 39_997]


def test_ranking_does_not_sort_a_vocabulary_since_tokens_far_down_seemed_likely() -> None:
    logits = np.random.default_rng(3).permutation(40_000).astype(np.float32)
    far_down = np.flatnonzero(logits < 20)
    sort, lengths = np.argsort, []

    def argsort(values: NDArray[np.float32], kind: Literal["stable"]) -> NDArray[np.intp]:
        lengths.append(len(values))
        return sort(values, kind=kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "argsort", argsort)
        found = ranked(logits, 5, far_down)
    assert logits[found].tolist() == [39_999, 39_998, 39_997, 39_996, 39_995]
    assert max(lengths) < 100


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0 - 2.0**-40])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 2.0, 4.0, 20.0, 200.0])
def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens(spread: float, top_p: float) -> None:
    """Also where most of a large vocabulary takes part, and where all tokens are equally likely."""
    logits = np.random.default_rng(5).normal(0, spread, 40_000).round(3)
    weights = np.exp(logits - logits.max()).astype(np.float32)
    among, left, floor = nucleus(weights, top_p, float(weights.sum()))
    assert np.isin(np.flatnonzero(weights >= floor), among).all()
    kept = among[left > 0.0]
    assert (left[left > 0.0] == weights[kept]).all()
    inside, outside = weights[kept].astype(np.float64), np.delete(weights, kept)
    wanted = top_p * weights.sum(dtype=np.float64)
    slack = 1e-5 * weights.sum()
    assert wanted - slack <= inside.sum() < wanted + inside.min() + slack
    assert inside.min() >= outside.max(initial=0.0)
    equal = np.flatnonzero(weights == weights[kept].min())
    assert (np.isin(equal, kept) == (np.arange(len(equal)) < np.isin(equal, kept).sum())).all()
    assert (np.diff(kept) > 0).all()


@given(
    seed=st.integers(0, 10_000),
    length=st.sampled_from([1, 7, 300, 2048, 2049, 2304, 5000]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    chance=st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.just(1.0 - 2.0**-53)),
)
def test_the_distribution_is_inverted_and_never_at_a_token_without_weight(
    seed: int, length: int, share: float, chance: float
) -> None:
    random = np.random.default_rng(seed)
    weights = np.exp(random.normal(0, 4, length)).astype(np.float32)
    weights[random.random(length) < share] = 0.0
    weights[random.integers(length)] = 1.0
    mass = np.cumsum(weights, dtype=np.float64)
    index = invert(weights, chance)
    assert weights[index] > 0.0
    slack = 1e-6 * mass[-1]
    assert mass[index] - weights[index] - slack <= chance * mass[-1] <= mass[index] + slack
