"""The mark of a text: which tokens are green, what the sampler makes of it, and the detector."""

import math
import re
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.engines.base import PlanError, SamplingParams, Watermark
from shards.sampling import Sampler, splitmix64
from shards.v1 import shard_pb2
from shards.watermark import Evidence, detect, is_green, mark
from shards.wire import plan_from_wire
from tests.engines.test_sampling import VOCAB, Row, draw_one, noise

USUAL = Watermark(0.5, 2.0, 15_485_863)
# Of the first 24 tokens, behind the token 7.
FIXED = [1, 2, 3, 4, 7, 9, 10, 11, 14, 18, 20, 21, 22, 23]
WORDS = st.integers(0, 2**64 - 1)
TOKENS = st.integers(0, 2**32 - 1)


def by_definition(previous: int, token: int, watermark: Watermark) -> bool:
    """The formula of docs/watermark.md, in numbers without an end."""
    hashed = splitmix64(splitmix64(splitmix64(watermark.key) ^ previous) ^ token)
    return hashed < watermark.gamma * 2**64


@given(key=WORDS, gamma=st.floats(0.001, 0.999), previous=TOKENS, token=TOKENS)
def test_a_token_is_green_by_the_definition(
    key: int, gamma: float, previous: int, token: int
) -> None:
    watermark = Watermark(gamma, 2.0, key)
    assert is_green(previous, token, watermark) == by_definition(previous, token, watermark)


def test_the_lists_are_fixed_for_ever() -> None:
    """A text that was marked by an earlier release is still found."""
    assert [token for token in range(24) if is_green(7, token, USUAL)] == FIXED


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.9])
def test_gamma_is_the_share_of_each_list_and_lists_are_independent(gamma: float) -> None:
    watermark, size = Watermark(gamma, 1.0, 3), 20_000
    lists = np.empty((6, size), bool)
    for previous, row in enumerate(lists):
        logits = np.zeros(size, np.float32)
        mark(logits, previous, watermark)
        row[:] = logits == 1.0
    spread = 5 * math.sqrt(gamma * (1 - gamma) / size)
    assert np.abs(lists.mean(axis=1) - gamma).max() < spread
    both = [(lists[n] & lists[m]).mean() for n in range(6) for m in range(n)]
    assert np.abs(np.array(both) - gamma**2).max() < 5 * gamma / math.sqrt(size)


def test_marking_adds_delta_to_green_tokens_and_nothing_to_others() -> None:
    logits = noise(3, 2.0)
    logits[5] = -math.inf
    before = logits.copy()
    mark(logits, 17, USUAL)
    green = np.array([is_green(17, token, USUAL) for token in range(VOCAB)])
    assert (logits == before + np.where(green, np.float32(2.0), np.float32(0.0))).all()


def answer(sampling: SamplingParams, count: int) -> list[int]:
    """A text of a model that knows the position and nothing else."""
    row = Row(sampling, [1, 2, 3])
    sampler = Sampler(VOCAB)
    for position in range(count):
        drawn = sampler.draw(noise(position, 2.0)[None], [row])
        row.tokens += drawn.tokens
    return row.tokens[2:]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mark_of_a_short_text_is_found_and_no_other(temperature: float) -> None:
    plain = SamplingParams(temperature=temperature, seed=4)
    marked = SamplingParams(temperature=temperature, seed=4, watermark=USUAL)
    found = detect(answer(marked, 120), USUAL)
    assert found.scored == 120
    assert found.z > 5
    assert found.chance < 1e-6
    assert abs(detect(answer(plain, 120), USUAL).z) < 3
    assert abs(detect(answer(marked, 120), Watermark(0.5, 2.0, 1)).z) < 3


def test_it_comes_before_bias_and_penalties_and_the_logprobs_stay_raw() -> None:
    green = next(token for token in range(VOCAB) if is_green(7, token, USUAL))
    red = next(token for token in range(VOCAB) if not is_green(7, token, USUAL))
    logits = np.full(VOCAB, -9.0, np.float32)
    logits[[green, red]] = 1.0, 2.5
    strong = SamplingParams(watermark=USUAL, logprobs=True, ranks=True)
    drawn = Sampler(VOCAB).draw(logits[None], [Row(strong)])
    assert drawn.tokens == [green]
    told = drawn.logprobs[0]
    assert told.logprob == pytest.approx(1.0 - 2.5 - math.log1p(math.exp(-1.5)), abs=1e-2)
    assert told.rank == 2
    # (1 + 2) / 1.25 = 2.4 is less than 2.5; 1 / 1.25 + 2 would be more.
    halved = SamplingParams(watermark=USUAL, repetition_penalty=1.25)
    assert draw_one(logits, Row(halved, [5, green, 7], 1)) == red
    biased = SamplingParams(watermark=USUAL, logit_bias=((red, 1.0),))
    assert draw_one(logits, Row(biased)) == red


def test_the_seed_is_the_token_before_whoever_wrote_it() -> None:
    """So a resumed sequence, whose prompt ends elsewhere or not, draws the same."""
    logits = noise(1, 1.0)
    marked = SamplingParams(watermark=USUAL)
    drawn = {draw_one(logits, Row(marked, [5, 6, 7], length)) for length in (1, 2, 3)}
    assert len(drawn) == 1
    others = {draw_one(logits, Row(marked, [5, 6, last])) for last in range(20)}
    assert len(others) > 1


def test_what_was_seen_before_counts_once() -> None:
    pair = next([7, token] for token in range(VOCAB) if is_green(7, token, USUAL))
    once, often = detect(pair, USUAL), detect(pair * 50, USUAL)
    assert once == Evidence(1, 1, 1.0)
    assert often.scored == 2


@pytest.mark.parametrize("tokens", [[], [4]])
def test_too_little_says_nothing(tokens: list[int]) -> None:
    assert detect(tokens, USUAL) == Evidence(0, 0, 0.0)
    assert detect(tokens, USUAL).chance == 0.5


def test_the_documented_detectors_find_the_same(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "watermark.md"
    programs = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text("\n".join(programs))
    tokens = answer(SamplingParams(temperature=1.0, seed=4, watermark=USUAL), 200)
    named = run_path(str(file), {"tokens": tokens})
    assert named["found"] == detect(tokens, USUAL)
    assert named["z_score"](tokens) == pytest.approx(named["found"].z)
    other = detect(tokens, Watermark(0.25, 0.0, 1)).z
    assert named["z_score"](tokens, key=1, gamma=0.25) == pytest.approx(other)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=60), st.sampled_from([0.25, 0.5]))
def test_the_detector_counts_by_the_definition(tokens: list[int], gamma: float) -> None:
    watermark = Watermark(gamma, 2.0, 5)
    pairs = set(pairwise(tokens))
    green = sum(by_definition(before, token, watermark) for before, token in pairs)
    found = detect(tokens, watermark)
    assert (found.scored, found.green) == (len(pairs), green)
    spread = math.sqrt(len(pairs) * gamma * (1 - gamma))
    assert found.z == pytest.approx((green - gamma * len(pairs)) / spread)


def wire(watermark: shard_pb2.Watermark | None) -> SamplingParams:
    sampling = shard_pb2.Sampling(watermark=watermark, ranks=True, logprobs=True)
    admit = shard_pb2.Admit(sequence=3, tokens=[1], prompt_len=1, sampling=sampling)
    return plan_from_wire(shard_pb2.Plan(admits=[admit])).admits[0].sampling


def test_it_travels_exactly() -> None:
    message = shard_pb2.Watermark(gamma=0.1, delta=2.3, key=2**64 - 1)
    expected = SamplingParams(logprobs=True, ranks=True, watermark=Watermark(0.1, 2.3, 2**64 - 1))
    assert wire(message) == expected
    assert wire(None).watermark is None


@pytest.mark.parametrize(
    ("gamma", "delta"), [(0.0, 2.0), (1.0, 2.0), (math.nan, 2.0), (0.5, math.inf), (0.5, math.nan)]
)
def test_a_mark_that_cannot_be_is_refused(gamma: float, delta: float) -> None:
    with pytest.raises(PlanError, match="sequence 3: a watermark of gamma"):
        wire(shard_pb2.Watermark(gamma=gamma, delta=delta))


def likelier(logits: NDArray[np.float32], token: int) -> int:
    return sum(value > logits[token] for value in logits.tolist())


@given(st.integers(0, 1000), st.sampled_from([2.0, 50.0]))
def test_a_rank_counts_what_is_strictly_likelier(seed: int, levels: float) -> None:
    logits = np.round(noise(seed, 3.0) * levels / 10).astype(np.float32)
    sampling = SamplingParams(temperature=3.0, seed=seed, logprobs=True, ranks=True)
    drawn = Sampler(VOCAB).draw(logits[None], [Row(sampling)])
    assert drawn.logprobs[0].rank == likelier(logits, drawn.tokens[0]) + 1
