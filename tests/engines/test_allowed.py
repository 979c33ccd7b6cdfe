"""Constraints in the sampler: what is drawn is always allowed, and as likely as it should be."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.allowed import GuideError, Words, holds, members
from shards.engines.base import Constraint, ConstraintKind, SamplingParams
from shards.sampling import Drawn, Sampler
from tests.engines.test_sampling import Row

CONSTRAINT = Constraint(ConstraintKind.REGEX, "a")
VOCAB = 1100


class Allows:
    """Allows these tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        bits[list(tokens)] = 1
        self._words: Words = np.packbits(bits, bitorder="little").view(np.uint32)

    def allowed(self) -> Words:
        return self._words


class Refuses:
    def allowed(self) -> Words:
        raise GuideError("it cannot go on")


def draw(logits: NDArray[np.float32], guide: object, **sampling: object) -> Drawn:
    params = SamplingParams(constraint=CONSTRAINT, **sampling)  # type: ignore[arg-type]
    before = logits.copy()
    row = Row(params, tokens=[5, 6, 7, 8], guide=guide)  # type: ignore[arg-type]
    drawn = Sampler(VOCAB).draw(logits[None], [row])
    assert np.array_equal(logits, before)
    return drawn


def logits_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 4, VOCAB).astype(np.float32)


samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-4, 0.7, 1.0, 5.0]),
        "seed": st.integers(0, 2**64 - 1),
        "top_k": st.sampled_from([0, 1, 3, 200]),
        "top_p": st.sampled_from([1.0, 0.9, 0.01]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "typical_p": st.sampled_from([1.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "logit_bias": st.sampled_from([(), ((3, 100.0), (8, -100.0))]),
        "logprobs": st.booleans(),
    }
)
few = st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
most = st.sets(st.integers(0, VOCAB - 1), max_size=40).map(
    lambda barred: set(range(VOCAB)) - barred
)


@given(seed=st.integers(0, 2**32 - 1), tokens=few | most, sampling=samplings)
def test_what_is_drawn_is_allowed(seed: int, tokens: set[int], sampling: dict[str, object]) -> None:
    drawn = draw(logits_of(seed), Allows(sorted(tokens)), **sampling)
    assert not drawn.failures
    assert drawn.tokens[0] in tokens


@given(seed=st.integers(0, 2**32 - 1), tokens=few | most)
def test_greedy_takes_the_likeliest_that_is_allowed(seed: int, tokens: set[int]) -> None:
    logits, ids = logits_of(seed), sorted(tokens)
    assert draw(logits, Allows(ids)).tokens == [ids[int(logits[ids].argmax())]]


@pytest.mark.parametrize("count", [5, 60, 80, VOCAB - 1, VOCAB])
def test_chances_are_those_of_what_is_left(count: int) -> None:
    """The same draw as from logits in which all else is impossible, few tokens or many."""
    logits = logits_of(1)
    ids = np.sort(np.random.default_rng(2).permutation(VOCAB)[:count])
    barred = np.full(VOCAB, -np.inf, np.float32)
    barred[ids] = logits[ids]
    for seed in range(300):
        params = SamplingParams(temperature=3.0, seed=seed, top_p=0.97)
        free = Sampler(VOCAB).draw(barred[None], [Row(params, tokens=[5, 6, 7, 8])])
        bound = draw(logits, Allows(ids), temperature=3.0, seed=seed, top_p=0.97)
        assert bound.tokens == free.tokens


def test_the_bias_of_a_client_cannot_lift_what_is_not_allowed() -> None:
    logits = logits_of(3)
    assert draw(logits, Allows([4]), logit_bias=((9, 100.0),)).tokens == [4]


def test_logprobs_stay_raw() -> None:
    logits = logits_of(4)
    log_total = float(np.log(np.exp(logits.astype(np.float64)).sum()))
    barred = int(logits.argmax())
    allowed = [token for token in range(VOCAB) if token != barred]
    drawn = draw(logits, Allows(allowed), logprobs=True, top_logprobs=2)
    said = drawn.logprobs[0]
    assert said.logprob == pytest.approx(float(logits[drawn.tokens[0]]) - log_total, abs=1e-4)
    assert said.top_tokens[0] == barred


@pytest.mark.parametrize(
    ("guide", "bias", "told"),
    [
        (Allows([]), (), "no token"),
        (Allows([4]), ((4, -float("inf")),), "no token"),
        (Allows(range(VOCAB)), tuple((n, -float("inf")) for n in range(VOCAB)), "no token"),
        (Refuses(), (), "it cannot go on"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_cannot_go_on_fails_alone(
    guide: object, bias: tuple[tuple[int, float], ...], told: str, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, logit_bias=bias, constraint=CONSTRAINT)
    rows = [Row(params, guide=guide), Row(SamplingParams())]  # type: ignore[arg-type]
    logits = np.stack([logits_of(5), logits_of(6)])
    drawn = Sampler(VOCAB).draw(logits, rows)
    assert list(drawn.failures) == [0]
    assert told in drawn.failures[0]
    assert drawn.tokens[1] == int(logits[1].argmax())


@given(tokens=st.sets(st.integers(0, VOCAB - 1)))
def test_bits_and_ids_are_the_same_thing(tokens: set[int]) -> None:
    words = Allows(sorted(tokens)).allowed()
    assert members(words).tolist() == sorted(tokens)
    assert {token for token in range(VOCAB) if holds(words, token)} == tokens
