"""What bias, penalties and min_tokens make of single logits."""

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.changes import change_of, penalties
from shards.engines.base import SamplingParams
from shards.tally import Tally

VOCAB = 60

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)
penalising = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 0.4]),
)


@dataclass
class Counted:
    tokens: list[int]
    prompt_len: int = 0


def tally_of(generated: list[int]) -> Tally:
    tally = Tally(Counted(generated))
    tally.count()
    return tally


@given(rows=st.lists(st.tuples(penalising, tokens), min_size=1, max_size=6))
def test_penalties_of_many_rows_are_those_of_each(
    rows: list[tuple[SamplingParams, list[int]]],
) -> None:
    logits = np.random.default_rng(4).normal(0, 5, (9, VOCAB)).astype(np.float32)
    places = list(range(8, 8 - len(rows), -1))
    tallies = [tally_of(generated) for _, generated in rows]
    changes = penalties(logits, places, [sampling for sampling, _ in rows], tallies)
    for place, (sampling, generated), change in zip(places, rows, changes, strict=True):
        alone = change_of(logits[place], sampling, len(generated), tally_of(generated))
        assert len(change.ids) == len(set(generated))
        order = np.argsort(change.ids)
        assert (change.ids[order] == alone.ids).all()
        assert (change.before[order] == alone.before).all()
        assert (change.before == logits[place][change.ids]).all()
        assert (change.after[order] == alone.after).all()


def test_bias_comes_before_penalties_and_the_mask_last() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5, 3.0], np.float32)
    sampling = SamplingParams(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((0, -4.0), (3, 1.0)),
        min_tokens=9,
        stop_tokens=(4, 77),
    )
    change = change_of(logits, sampling, 3, tally_of([0, 1, 0]))
    assert change.ids.tolist() == [0, 1, 3, 4]
    assert change.before.tolist() == [2.0, -2.0, 0.5, 3.0]
    assert change.after.tolist() == [-4.0 - 1.0 - 0.25, -4.0 - 0.5 - 0.25, 1.5, -math.inf]


def test_ends_are_masked_until_there_are_enough_tokens() -> None:
    logits = np.ones(8, np.float32)
    sampling = SamplingParams(min_tokens=2, stop_tokens=(5,))
    assert change_of(logits, sampling, 1, None).after.tolist() == [-math.inf]
    assert not len(change_of(logits, sampling, 2, None).ids)
