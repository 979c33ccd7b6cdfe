"""The part of the contract that is about log probabilities of prompts, for engines that tell them.

What they must be is known without them: generation with the token of the prompt forced by a bias
reports its raw log probability, behind a prompt that ends before it.
"""

import math
from collections.abc import Sequence

import pytest

from shards import prompt_logprobs
from shards.engines.base import Engine, Logprobs, Outcome, Plan, PromptLogprobs, SamplingParams
from tests.engines.contract_sampling import rank_bounds
from tests.engines.driving import GREEDY, admit, decode, generate, shareable

SCORED = SamplingParams(prompt_logprobs=True)
TOP = SamplingParams(prompt_logprobs=True, logprobs=True, top_logprobs=3)
FORCED = 1e4


def forced(engine: Engine, prompt: Sequence[int], position: int, top: int) -> Logprobs:
    """What generation says of the token at a position of a prompt."""
    engine.reset()
    bias = ((prompt[position], FORCED),)
    sampling = SamplingParams(logprobs=True, top_logprobs=top, logit_bias=bias)
    made = admit(1, prompt[:position], sampling)
    outcome = engine.step(Plan(admits=[made], work=[(1, position)]))
    assert outcome.tokens == [prompt[position]]
    return outcome.logprobs[1]


def fill_scored(
    engine: Engine,
    sequence: int,
    tokens: Sequence[int],
    chunks: Sequence[int],
    sampling: SamplingParams = SCORED,
    prompt_len: int = 0,
) -> tuple[list[PromptLogprobs], list[int]]:
    """Computes a sequence chunk by chunk; returns what was told of its prompt, and its token."""
    assert sum(chunks) == len(tokens)
    admits = [admit(sequence, tokens, sampling, prompt_len=prompt_len)]
    told: list[PromptLogprobs] = []
    outcome = Outcome()
    for chunk in chunks:
        outcome = engine.step(Plan(admits=admits, work=[(sequence, chunk)]))
        told += outcome.prompt_logprobs.values()
        admits = []
    return told, outcome.tokens


def joined(told: Sequence[PromptLogprobs]) -> list[float]:
    """Log probabilities of a prompt from its second token on, told without a gap."""
    values: list[float] = []
    for part in told:
        assert part.start == len(values) + 1
        assert part.logprobs
        assert len(part.likeliest) in (0, len(part.logprobs))
        values += part.logprobs
    return values


class PromptContract:
    near = 1e-4
    """How far rounding may move a log probability that is computed in another way, in nats."""
    late = False
    """Whether the engine tells of a prompt when all of it is computed, and not chunk by chunk."""

    def test_they_are_what_generation_says(self, engine: Engine, prompts: list[list[int]]) -> None:
        prompt = prompts[0]
        told, drawn = fill_scored(engine, 1, prompt, [len(prompt)], TOP)
        values = joined(told)
        assert len(values) == len(prompt) - 1
        pairs = [pair for part in told for pair in part.likeliest]
        for position in range(1, len(prompt), 3):
            expected = forced(engine, prompt, position, 3)
            assert values[position - 1] == pytest.approx(expected.logprob, abs=self.near)
            found = pairs[position - 1]
            numbers = [value for _, value in found]
            assert numbers == pytest.approx(list(expected.top_values), abs=self.near)
            assert [token for token, _ in found] == list(expected.top_tokens)
        engine.reset()
        assert drawn == generate(engine, 1, prompt, 1)

    def test_likeliest_ones_are_in_order_and_name_the_token(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt, vocabulary = prompts[0][:4], engine.describe().vocab_size
        everything = SamplingParams(prompt_logprobs=True, top_logprobs=vocabulary)
        told, _ = fill_scored(engine, 1, prompt, [4], everything)
        for target, value, pairs in zip(
            prompt[1:], told[0].logprobs, told[0].likeliest, strict=True
        ):
            assert sorted(token for token, _ in pairs) == list(range(vocabulary))
            assert [number for _, number in pairs] == sorted(
                (number for _, number in pairs), reverse=True
            )
            assert math.fsum(math.exp(number) for _, number in pairs) == pytest.approx(1, abs=1e-4)
            assert dict(pairs)[target] == pytest.approx(value, abs=1e-4)

    def test_ranks_of_the_prompt_count_likelier_tokens(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt, vocabulary = prompts[0][:12], engine.describe().vocab_size
        everything = SamplingParams(prompt_logprobs=True, top_logprobs=vocabulary, ranks=True)
        told, _ = fill_scored(engine, 1, prompt, [5, 7], everything)
        joined(told)
        assert all(len(part.ranks) == len(part.logprobs) for part in told)
        places = [
            (value, rank, [number for _, number in pairs])
            for part in told
            for value, rank, pairs in zip(part.logprobs, part.ranks, part.likeliest, strict=True)
        ]
        assert len(places) == 11
        for value, rank, numbers in places:
            low, high = rank_bounds(value, numbers)
            assert low <= rank <= high
        assert len({rank for _, rank, _ in places}) > 1
        engine.reset()
        told, _ = fill_scored(engine, 1, prompt, [12], TOP)
        assert not any(part.ranks for part in told)

    @pytest.mark.parametrize("chunks", [(1, 1), (7, 11), (1, 12, 1)])
    def test_chunks_tell_as_one(
        self, engine: Engine, prompts: list[list[int]], chunks: tuple[int, ...]
    ) -> None:
        prompt = prompts[0]
        whole, token = fill_scored(engine, 1, prompt, [len(prompt)])
        engine.reset()
        parts, same = fill_scored(engine, 2, prompt, [*chunks, len(prompt) - sum(chunks)])
        assert len(parts) == (1 if self.late else len(chunks) + 1)
        assert joined(parts) == pytest.approx(joined(whole), abs=self.near)
        assert same == token

    def test_more_than_one_pass_can_hold(
        self, engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        long, other = (prompts[0] * 3)[:60], prompts[1]
        alone = generate(engine, 1, other, 2)
        engine.reset()
        whole, token = fill_scored(engine, 1, long, [60])
        engine.reset()
        monkeypatch.setattr(prompt_logprobs, "ROWS_MAX", 16)
        first = engine.step(Plan(admits=[admit(2, other)], work=[(2, len(other))]))
        plan = Plan(admits=[admit(1, long, SCORED)], work=[(1, 60), (2, 1)])
        outcome = engine.step(plan)
        assert joined([outcome.prompt_logprobs[1]]) == pytest.approx(joined(whole), abs=self.near)
        drawn = dict(zip(outcome.sequences, outcome.tokens, strict=True))
        assert [drawn[1]] == token
        assert [*first.tokens, drawn[2]] == alone

    def test_in_company_as_alone(self, engine: Engine, prompts: list[list[int]]) -> None:
        first, second, third = prompts[:3]
        alone, token = fill_scored(engine, 1, first, [len(first)])
        engine.reset()
        others = [generate(engine, n, prompt, 3) for n, prompt in ((2, second), (3, third))]
        engine.reset()
        engine.step(Plan(admits=[admit(2, second)], work=[(2, len(second))]))
        half = len(first) // 2
        third_scored = admit(3, third, TOP)
        one = engine.step(
            Plan(
                admits=[admit(1, first, SCORED), third_scored],
                work=[(1, half), (2, 1), (3, len(third))],
            )
        )
        assert sorted(one.sequences) == [2, 3]
        assert list(one.prompt_logprobs) == ([3] if self.late else [1, 3])
        assert len(one.prompt_logprobs[3].logprobs) == len(third) - 1
        assert [len(pairs) for pairs in one.prompt_logprobs[3].likeliest] == [3] * (len(third) - 1)
        two = engine.step(Plan(work=[(3, 1), (1, len(first) - half), (2, 1)]))
        assert sorted(two.sequences) == [1, 2, 3]
        assert list(two.prompt_logprobs) == [1]
        told = [step.prompt_logprobs[1] for step in (one, two) if 1 in step.prompt_logprobs]
        assert not any(part.likeliest for part in told)
        assert joined(told) == pytest.approx(joined(alone), abs=self.near)
        drawn = dict(zip(two.sequences, two.tokens, strict=True))
        before = dict(zip(one.sequences, one.tokens, strict=True))
        assert drawn[1] == token[0]
        assert [before[2], drawn[2]] == others[0][1:3]
        assert [before[3], drawn[3]] == others[1][:2]

    def test_only_the_prompt_is_told_after_a_loss(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt = prompts[1]
        unbroken = generate(engine, 1, prompt, 8)
        engine.reset()
        whole, _ = fill_scored(engine, 1, prompt, [len(prompt)])
        engine.reset()
        known = [*prompt, *unbroken[:4]]
        chunks = [len(prompt) - 2, 4, 2]
        told, token = fill_scored(engine, 9, known, chunks, prompt_len=len(prompt))
        sizes = [len(prompt) - 1] if self.late else [len(prompt) - 2, 1]
        assert [len(part.logprobs) for part in told] == sizes
        assert joined(told) == pytest.approx(joined(whole), abs=self.near)
        assert token + decode(engine, 9, 3) == unbroken[4:]

    def test_nothing_is_told_unasked_nor_of_a_prompt_of_one_token(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        outcome = engine.step(
            Plan(
                admits=[admit(1, prompts[0]), admit(2, prompts[1][:1], SCORED)],
                work=[(1, len(prompts[0])), (2, 1)],
            )
        )
        assert outcome.sequences == [1, 2]
        assert outcome.prompt_logprobs == {}
        assert engine.step(Plan(work=[(1, 1), (2, 1)])).prompt_logprobs == {}

    def test_others_can_share_what_was_scored(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        share = shareable(engine, len(prompts[0]) - 1)
        assert share, "a prompt has a page at least"
        tokens = [*prompts[0][:share], *prompts[1][:5]]
        expected = generate(engine, 1, tokens, 3)
        engine.reset()
        fill_scored(engine, 1, prompts[0], [len(prompts[0])])
        made = admit(2, tokens, GREEDY, share_from=1, share_len=share)
        first = engine.step(Plan(admits=[made], work=[(2, len(tokens) - share)]))
        assert first.prompt_logprobs == {}
        assert first.tokens + decode(engine, 2, 2) == expected
