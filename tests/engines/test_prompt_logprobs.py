"""How prompts are scored, against a slow reference; and how a step's work is cut for it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.engines.base import Admit, Outcome, SamplingParams
from shards.prompt_logprobs import ROWS_MAX, Scores, parts_of, score, targets_of
from shards.residents import Limits, Resident, Residents

SCORED = SamplingParams(prompt_logprobs=True)
PLAIN = SamplingParams()
VOCABULARY = 40_000  # more than one block of rows


def resident(
    tokens: int, sampling: SamplingParams = SCORED, *, computed: int = 0, prompt_len: int = 0
) -> Resident:
    residents = Residents(Limits(10_000, 1, 8, 10_000, 10_000, VOCABULARY))
    known = list(range(100, 100 + tokens))
    made = residents.admit(Admit(1, known, prompt_len or tokens, sampling))
    if computed:
        residents.compute(made, computed)
    return made


def reference(row: Sequence[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(value) for value in row))
    return [value - total for value in row]


def logits_of(rows: int, vocabulary: int = 300) -> np.ndarray:
    return np.random.default_rng(rows).normal(0, 4, (rows, vocabulary)).astype(np.float32)


def test_scores_are_those_of_the_slow_reference() -> None:
    logits = logits_of(5)
    logprobs, pairs = score(logits, [3, 1, 4, 1, 5], 4)
    for index, target in enumerate((3, 1, 4, 1, 5)):
        expected = reference(logits[index].astype(float))
        assert logprobs[index] == pytest.approx(expected[target], abs=1e-5)
        order = sorted(range(300), key=lambda token: (-expected[token], token))[:4]
        assert [token for token, _ in pairs[index]] == order
        assert [value for _, value in pairs[index]] == pytest.approx(
            [expected[token] for token in order], abs=1e-5
        )


def test_of_equal_tokens_the_smaller_goes_first() -> None:
    logits = np.zeros((1, 300), np.float32)
    ((pairs),) = score(logits, [7], 3)[1]
    assert [token for token, _ in pairs] == [0, 1, 2]


def test_a_token_that_cannot_be_is_no_fault() -> None:
    logits = logits_of(1)
    logits[0, 7] = -np.inf
    scores, outcome = Scores(), Outcome()
    one = resident(2)
    scores.take(one, [7], logits)
    scores.tell(outcome)
    assert outcome.failures == {}
    assert outcome.prompt_logprobs[1].logprobs == [-math.inf]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_fail_the_sequence_alone(broken: float) -> None:
    bad, good = resident(4, SamplingParams(prompt_logprobs=True, top_logprobs=2)), resident(4)
    good.sequence = 2
    logits = logits_of(6)
    logits[4, 11] = broken
    scores, outcome = Scores(), Outcome()
    scores.take(good, [1, 2, 3], logits[:3])
    scores.take(bad, [1, 2, 3], logits[3:])
    assert bad.failed
    scores.tell(outcome)
    assert outcome.failures == {1: "the engine's logits are not finite numbers"}
    assert list(outcome.prompt_logprobs) == [2]
    again = Outcome()
    scores.tell(again)
    assert again == Outcome()


def test_many_rows_are_reduced_block_by_block() -> None:
    one = resident(60)
    logits = np.random.default_rng(1).normal(0, 4, (59, VOCABULARY)).astype(np.float32)
    targets = targets_of(one, 60)
    scores, outcome = Scores(), Outcome()
    scores.take(one, targets, logits)
    scores.tell(outcome)
    told = outcome.prompt_logprobs[1]
    assert told.start == 1
    assert told.logprobs == score(logits, targets, 0)[0]


def test_a_chunk_scores_the_tokens_behind_its_own() -> None:
    assert list(targets_of(resident(5), 2)) == [101, 102]
    assert list(targets_of(resident(5, computed=2), 2)) == [103, 104]
    assert list(targets_of(resident(5, computed=4), 1)) == []
    assert list(targets_of(resident(9, computed=2, prompt_len=4), 7)) == [103]
    assert list(targets_of(resident(9, computed=6, prompt_len=4), 3)) == []
    assert list(targets_of(resident(5, PLAIN), 5)) == []


def test_rows_that_draw_are_told_from_those_that_score() -> None:
    first, second, third = resident(3), resident(2, PLAIN), resident(4)
    third.sequence = 3
    work = [(first, 3), (second, 2), (third, 2)]
    logits = logits_of(6)
    scores, outcome = Scores(), Outcome()
    assert scores.rows_of(work) == 4
    # Two scores and a draw, a draw, two scores.
    draws = scores.part(work, logits)
    assert (draws == logits[[2, 3]]).all()
    scores.tell(outcome)
    assert outcome.prompt_logprobs[1].logprobs == score(logits[:2], [101, 102], 0)[0]
    assert outcome.prompt_logprobs[3].logprobs == score(logits[4:], [101, 102], 0)[0]


def test_rows_that_all_draw_are_not_copied() -> None:
    work = [(resident(2, PLAIN), 2), (resident(1), 1)]
    logits = logits_of(2)
    assert Scores().part(work, logits) is logits


@given(st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=8))
def test_work_is_cut_until_no_pass_scores_too_many(wanted: list[tuple[int, bool]]) -> None:
    work = []
    for number, (count, scored) in enumerate(wanted):
        one = resident(count, SCORED if scored else PLAIN)
        one.sequence = number
        work.append((one, count))
    counts = dict.fromkeys(range(len(work)), 0)
    drawn: list[int] = []
    for part in parts_of(work):
        passed = 0
        for one, count in part:
            assert count > 0
            passed += len(targets_of(one, count))
            counts[one.sequence] += count
            one.computed += count
            if one.computed == len(one.tokens):
                drawn.append(one.sequence)
        assert passed <= max(ROWS_MAX, len(work))
    assert counts == {number: count for number, (count, _) in enumerate(wanted)}
    assert drawn == list(range(len(work))), "everything draws in the order of the work"


def test_work_without_scores_is_not_cut() -> None:
    work = [(resident(400, PLAIN), 400)]
    assert parts_of(work) == [work]
