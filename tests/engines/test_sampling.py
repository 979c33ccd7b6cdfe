"""The sampler against a slow, clear one that sorts everything and rounds late."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.allowed import Guiding
from shards.engines.base import SamplingParams
from shards.residents import is_plain
from shards.sampling import Sampler, splitmix64, uniform

VOCAB = 1100


@dataclass
class Row:
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tokens: list[int] = field(default_factory=lambda: [5, 6, 7])
    prompt_len: int = 3
    guide: Guiding | None = None

    @property
    def plain(self) -> bool:
        return is_plain(self.sampling)


def draw_one(logits: NDArray[np.float32], row: Row) -> int:
    drawn = Sampler(len(logits)).draw(logits[None], [row])
    assert not drawn.failures
    return drawn.tokens[0]


def warp(logits: NDArray[np.float32], row: Row) -> NDArray[np.float64]:
    """Probabilities that the next token is drawn from, as the documentation says it."""
    sampling = row.sampling
    scores = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    generated = row.tokens[row.prompt_len :]
    for token in set(generated):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= sampling.frequency_penalty * generated.count(token)
        scores[token] -= sampling.presence_penalty
    if len(generated) < sampling.min_tokens:
        scores[list(sampling.stop_tokens)] = -math.inf
    ranks = np.lexsort((np.arange(len(scores)), -scores))
    keep = np.zeros(len(scores), bool)
    keep[ranks[: sampling.top_k or len(scores)]] = True
    weights = np.exp((scores - scores.max()) / sampling.temperature) * keep
    if sampling.top_p < 1:
        mass = np.cumsum(weights[ranks]) / weights.sum()
        keep[ranks[int(np.searchsorted(mass, sampling.top_p)) + 1 :]] = False
    weights *= keep
    keep &= weights >= sampling.min_p
    weights *= keep
    if sampling.typical_p < 1:
        chances = weights / weights.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(chances)
            entropy = np.nansum(np.where(chances > 0, chances * surprise, 0))
        distance = np.where(chances > 0, np.abs(surprise - entropy), math.inf)
        order = np.lexsort((np.arange(len(scores)), distance))
        last = int(np.searchsorted(np.cumsum(chances[order]), sampling.typical_p))
        weights[order[last + 1 :]] = 0
    return weights / weights.sum()


def noise(seed: int, spread: float) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return random.normal(0, spread, VOCAB).astype(np.float32)


params = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 0, 1, 2, 40, VOCAB - 1, VOCAB, 100_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.lists(
        st.tuples(st.integers(0, VOCAB - 1), st.floats(-50, 10)),
        max_size=4,
        unique_by=lambda x: x[0],
    ).map(tuple),
    min_tokens=st.integers(0, 6),
    stop_tokens=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)


@given(
    sampling=params,
    noise_seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 1.0, 4.0, 20.0]),
    generated=st.lists(st.integers(0, 30), max_size=8),
)
def test_draws_as_the_reference(
    sampling: SamplingParams, noise_seed: int, spread: float, generated: list[int]
) -> None:
    logits = noise(noise_seed, spread)
    row = Row(sampling, [1, 2, *generated], 2)
    token = draw_one(logits, row)
    chances = warp(logits, row)
    mass = np.cumsum(chances)
    chance = uniform(sampling.seed, len(row.tokens))
    # Single precision moves borders a little: by one token of a filter, and by rounding of masses.
    # It also swaps tokens that are almost equally typical, of which there are many if all are rare.
    slack = 2e-4 + 2 * _border(logits, row) + (4 / VOCAB if sampling.typical_p < 1 else 0)
    below = mass[token] - chances[token]
    assert below - slack <= chance <= mass[token] + slack


def _border(logits: NDArray[np.float32], row: Row) -> float:
    """The largest change of the distribution when each filter keeps one token more or less."""
    sampling = row.sampling
    exact = warp(logits, row)
    worst = 0.0
    for sign in (-1, 1):
        moved = {
            name: min(1.0, max(1e-9, value + sign * 2e-6)) if 0 < value < 1 else value
            for name in ("top_p", "typical_p", "min_p")
            if (value := getattr(sampling, name)) is not None
        }
        if sampling.min_p == 1.0:
            moved["min_p"] = 1.0 - 2e-6 if sign < 0 else 1.0
        other = SamplingParams(
            **{
                name: moved.get(name, getattr(sampling, name))
                for name in SamplingParams.__dataclass_fields__
            }
        )
        shifted = warp(logits, Row(other, row.tokens, row.prompt_len))
        worst = max(worst, float(np.abs(np.cumsum(shifted) - np.cumsum(exact)).max()))
    return worst


@pytest.mark.parametrize("bias", [-30.0, -0.5, 0.5, 30.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("place", [0, 1, 2, -1])
@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_a_change_of_few_logits_draws_as_the_changed_row_does(
    bias: float, temperature: float, place: int, min_p: float
) -> None:
    """Whether it lowers the largest, makes another one the largest, equals it, or neither."""
    logits = noise(8, 2.0).round(1)
    order = np.argsort(-logits, kind="stable")
    logits[order[1]] = logits[order[0]] - np.float32(0.5)
    token = int(order[place])
    changed = logits.copy()
    changed[token] += np.float32(bias)
    for seed in range(40):
        plain = SamplingParams(temperature=temperature, seed=seed, top_p=0.97, min_p=min_p)
        biased = replace(plain, logit_bias=((token, bias),))
        assert draw_one(logits, Row(biased)) == draw_one(changed, Row(plain))


@pytest.mark.parametrize("lead", [2.0, 12.0, 60.0, 300.0])
@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_without_the_only_likely_token_the_others_are_drawn_as_if_it_had_never_been(
    lead: float, top_p: float
) -> None:
    """Though beside it they weighed next to nothing."""
    logits = noise(8, 2.0)
    token = int(logits.argmax())
    logits[token] += np.float32(lead)
    without = logits.copy()
    without[token] = -math.inf
    for seed in range(40):
        plain = SamplingParams(temperature=1.0, seed=seed, top_p=top_p)
        masked = replace(plain, min_tokens=1, stop_tokens=(token,))
        assert draw_one(logits, Row(masked)) == draw_one(without, Row(plain))


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    counts = np.zeros(4)
    for position in range(4000):
        row = Row(SamplingParams(temperature=1.0, seed=9), [0] * (position + 1), 1)
        counts[draw_one(logits, row)] += 1
    assert np.abs(counts / 4000 - [0.5, 0.25, 0.125, 0.125]).max() < 0.03


def test_uniform_is_fixed_for_ever() -> None:
    """A resumed sequence draws what it would have drawn, also after an upgrade."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert uniform(0, 0) == pytest.approx(0.6524484863740322, abs=0)
    values = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert 0.0 <= min(values) < max(values) < 1.0
    assert len(set(values)) == 2500
    assert abs(sum(values) / 2500 - 0.5) < 0.02


def test_neighbours_have_no_influence() -> None:
    rows = [
        Row(SamplingParams(temperature=1.0, seed=1)),
        Row(),
        Row(SamplingParams(temperature=0.7, top_k=5, top_p=0.9, seed=2, logprobs=True)),
        Row(SamplingParams(frequency_penalty=1.0), [1, 2, 2], 1),
    ]
    logits = np.stack([noise(n, 3.0) for n in range(4)])
    together = Sampler(VOCAB).draw(logits, rows)
    assert together.tokens == [draw_one(logits[n], rows[n]) for n in range(4)]
    assert list(together.logprobs) == [2]


def test_the_logits_are_left_alone() -> None:
    logits = noise(1, 3.0)[None]
    before = logits.copy()
    sampling = SamplingParams(
        temperature=1.0, logit_bias=((3, 5.0),), presence_penalty=1.0, top_logprobs=3, logprobs=True
    )
    Sampler(VOCAB).draw(logits, [Row(sampling, [1, 2, 3], 1)])
    assert (logits == before).all()


@given(
    sampling=params,
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 4.0, 20.0]),
    generated=st.lists(st.integers(0, 30), max_size=8),
    exact=st.booleans(),
)
def test_log_probabilities_are_of_the_raw_logits(
    sampling: SamplingParams, seed: int, spread: float, generated: list[int], exact: bool
) -> None:
    """Also where their total is had from the weights that the token was drawn by."""
    temperature = 1.0 if exact else sampling.temperature
    sampling = replace(sampling, temperature=temperature, logprobs=True, top_logprobs=5, ranks=True)
    _check_logprobs(noise(seed, spread), Row(sampling, [1, 2, *generated], 2))


@pytest.mark.parametrize("bias", [-1e30, -800.0, -60.0, 60.0, 800.0, 1e30])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("peak", [3.0, 1000.0])
def test_no_bias_spoils_a_log_probability(bias: float, top_p: float, peak: float) -> None:
    """Neither one on the only likely token, nor one on a token that nobody would draw."""
    logits = noise(6, 3.0)
    logits[40] = peak
    for token in (40, int(logits.argmin())):
        sampling = SamplingParams(
            temperature=1.0,
            top_p=top_p,
            logit_bias=((token, bias),),
            logprobs=True,
            top_logprobs=3,
            ranks=True,
        )
        _check_logprobs(logits, Row(sampling))


@pytest.mark.parametrize("place", [0, 1, 4, 5])
def test_what_penalties_take_out_of_the_nucleus_keeps_its_log_probability(place: int) -> None:
    logits = noise(6, 3.0)
    token = int(np.argsort(-logits)[place])
    sampling = SamplingParams(
        temperature=1.0, top_p=0.9, presence_penalty=30.0, logprobs=True, top_logprobs=5, ranks=True
    )
    _check_logprobs(logits, Row(sampling, [1, token], 1))


def _check_logprobs(logits: NDArray[np.float32], row: Row) -> None:
    drawn = Sampler(VOCAB).draw(logits[None], [row])
    if drawn.failures:
        return
    token, told = drawn.tokens[0], drawn.logprobs[0]
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= math.log(np.exp(exact).sum())
    assert told.logprob == pytest.approx(exact[token], rel=1e-6, abs=1e-5)
    likeliest = np.lexsort((np.arange(VOCAB), -logits))[: row.sampling.top_logprobs]
    assert told.top_tokens == likeliest.tolist()
    assert told.top_values == pytest.approx(exact[likeliest], rel=1e-6, abs=1e-5)
    assert told.rank == np.count_nonzero(logits > logits[token]) + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_row_only(bad: float) -> None:
    logits = np.stack([noise(1, 3.0), noise(2, 3.0)])
    logits[0, 17] = bad
    drawn = Sampler(VOCAB).draw(logits, [Row(), Row()])
    assert list(drawn.failures) == [0]
    assert drawn.tokens[1] == int(logits[1].argmax())


def test_a_row_without_any_token_left_fails() -> None:
    sampling = SamplingParams(min_tokens=1, stop_tokens=tuple(range(VOCAB)))
    drawn = Sampler(VOCAB).draw(noise(1, 3.0)[None], [Row(sampling)])
    assert drawn.failures == {0: "bias, penalties and min_tokens leave no token to draw"}


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6])
def test_extreme_temperatures_draw_something(temperature: float) -> None:
    logits = noise(3, 5.0)
    token = draw_one(logits, Row(SamplingParams(temperature=temperature)))
    assert temperature > 1 or token == int(logits.argmax())


def test_masked_tokens_are_never_drawn_by_any_filter() -> None:
    logits = noise(4, 1.0)
    banned = tuple(range(0, VOCAB, 2))
    for seed in range(60):
        for filters in ({}, {"top_p": 0.99}, {"typical_p": 0.9}, {"min_p": 0.001}, {"top_k": 600}):
            sampling = SamplingParams(
                temperature=2.0, seed=seed, min_tokens=1, stop_tokens=banned, **filters
            )
            assert draw_one(logits, Row(sampling)) % 2 == 1
