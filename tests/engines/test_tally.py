"""What penalties count, kept from one step to the next, and the draws that follow from it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import pytest

from shards.engines.base import SamplingParams
from shards.sampling import Sampler
from shards.tally import Tallies

VOCAB = 700
PENALTIES = SamplingParams(
    temperature=1.0,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    presence_penalty=0.4,
    logprobs=True,
)


class Watched(list[int]):
    """A list that knows how many of its items were read."""

    read = 0

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> list[int]: ...
    def __getitem__(self, key: int | slice) -> int | list[int]:
        found = super().__getitem__(key)
        self.read += len(found) if isinstance(found, list) else 1
        return found


@dataclass
class Row:
    tokens: list[int]
    prompt_len: int = 2
    sampling: SamplingParams = field(default_factory=lambda: PENALTIES)
    plain: bool = False
    guide: None = None


def counted(tallies: Tallies, row: Row) -> dict[int, int]:
    tally = tallies.of(row)
    ids = tally.ids.tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, tally.often.tolist(), strict=True))


def test_a_tally_grows_with_its_sequence() -> None:
    tallies, row = Tallies(), Row([3, 3])
    random = np.random.default_rng(2)
    for token in random.integers(0, 300, 900).tolist():
        tallies.turn()
        assert counted(tallies, row) == Counter(row.tokens[2:])
        row.tokens.append(token)


def test_each_token_is_counted_once() -> None:
    tokens = Watched(range(100))
    tallies, row = Tallies(), Row(tokens)
    for token in range(50):
        tallies.turn()
        tallies.of(row)
        tokens.append(token)
    assert tokens.read == 98 + 49


def test_a_sequence_that_left_and_came_back_is_counted_right() -> None:
    tallies, row, other = Tallies(), Row([1, 2, 3]), Row([1, 2, 9])
    for present in ([row, other], [other], [], [row], [row, other]):
        tallies.turn()
        for one in present:
            assert counted(tallies, one) == Counter(one.tokens[2:])
            one.tokens.append(len(one.tokens))


def test_sequences_that_take_the_place_of_others_do_not_inherit() -> None:
    """Their objects may lie where the former ones lay."""
    tallies = Tallies()
    for first in range(200):
        tallies.turn()
        row = Row([0, 0, first, 5])
        assert counted(tallies, row) == Counter(row.tokens[2:])


@pytest.mark.parametrize("bias", [(), ((5, 1.0), (5, 2.0), (650, -3.0))])
def test_draws_are_the_same_step_by_step_and_at_once(bias: tuple[tuple[int, float], ...]) -> None:
    """As when a sequence is resumed elsewhere. A token may be biased twice, and be a stop token."""
    sampling = SamplingParams(
        temperature=1.0,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logit_bias=bias,
        min_tokens=20,
        stop_tokens=(5, 6),
        logprobs=True,
    )
    sampler, row = Sampler(VOCAB), Row([1, 2], sampling=sampling)
    random = np.random.default_rng(8)
    for _ in range(40):
        logits = random.normal(0, 1.5, (1, VOCAB)).astype(np.float32)
        drawn = sampler.draw(logits, [row])
        fresh = Sampler(VOCAB).draw(logits, [Row(list(row.tokens), sampling=sampling)])
        assert (drawn.tokens, drawn.logprobs) == (fresh.tokens, fresh.logprobs)
        exact = logits[0].astype(np.float64)
        exact -= np.log(np.exp(exact).sum())
        assert drawn.logprobs[0].logprob == pytest.approx(exact[drawn.tokens[0]], abs=1e-5)
        row.tokens.append(drawn.tokens[0])
