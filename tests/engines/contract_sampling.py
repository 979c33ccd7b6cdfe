"""The part of the contract that is about drawing: what a request may ask of each token."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from shards.engines.base import Engine, Plan, PlanError, SamplingParams, Watermark
from shards.watermark import detect, is_green
from tests.engines.driving import GREEDY, SEEDED, admit, by_token, generate

# So strong that only green tokens are drawn, whatever the model says.
MARK = Watermark(0.25, 1e4, 15_485_863)


def rank_bounds(value: float, values: Sequence[float]) -> tuple[int, int]:
    """The ranks that a log probability can have among these, when rounding makes equals of some."""
    low, high = (sum(other > value + near for other in values) for near in (1e-5, -1e-5))
    # Of the tokens that are counted for the upper bound one is the token itself.
    return low + 1, high


def refuses(engine: Engine, prompt: Sequence[int], sampling: SamplingParams, feature: str) -> bool:
    """Whether the engine lacks a feature; then it must say so by name."""
    info = engine.describe()
    if feature in info.features:
        return False
    plan = Plan(admits=[admit(1, prompt, sampling)], work=[(1, len(prompt))])
    with pytest.raises(PlanError, match=f"{info.engine} does not support {feature}"):
        engine.step(plan)
    return True


class SamplingContract:
    def test_a_seed_decides(self, engine: Engine, prompts: list[list[int]]) -> None:
        def drawn(seed: int) -> list[int]:
            engine.reset()
            return generate(engine, 1, prompts[0], 8, SamplingParams(temperature=1.5, seed=seed))

        assert drawn(1) == drawn(1)
        assert len({tuple(drawn(seed)) for seed in range(4)}) > 1

    def test_logprobs_are_raw_and_natural(self, engine: Engine, prompts: list[list[int]]) -> None:
        def logprobs(count: int, **warps: float) -> object:
            engine.reset()
            sampling = SamplingParams(logprobs=True, top_logprobs=count, **warps)  # type: ignore[arg-type]
            outcome = engine.step(
                Plan(admits=[admit(1, prompts[0], sampling)], work=[(1, len(prompts[0]))])
            )
            return outcome.tokens[0], outcome.logprobs[1]

        vocabulary = engine.describe().vocab_size
        token, everything = logprobs(vocabulary)
        assert sorted(everything.top_tokens) == list(range(vocabulary))
        assert list(everything.top_values) == sorted(everything.top_values, reverse=True)
        assert math.fsum(map(math.exp, everything.top_values)) == pytest.approx(1.0, abs=1e-4)
        assert everything.top_tokens[0] == token
        assert everything.logprob == pytest.approx(everything.top_values[0])
        raw = dict(zip(everything.top_tokens, everything.top_values, strict=True))
        token, warped = logprobs(3, temperature=2.0, top_k=5, seed=1, presence_penalty=1.0)
        assert warped.logprob == pytest.approx(raw[token], abs=1e-3)
        assert list(warped.top_values) == pytest.approx(list(everything.top_values[:3]), abs=1e-3)
        assert list(warped.top_tokens) == list(everything.top_tokens[:3])

    def test_reports_logprobs_only_where_asked(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        asked = admit(2, prompts[1], SamplingParams(logprobs=True))
        outcome = engine.step(
            Plan(
                admits=[admit(1, prompts[0]), asked],
                work=[(1, len(prompts[0])), (2, len(prompts[1]))],
            )
        )
        assert sorted(outcome.sequences) == [1, 2]
        assert list(outcome.logprobs) == [2]
        assert list(outcome.logprobs[2].top_tokens) == []

    def test_min_tokens_bars_stop_tokens(self, engine: Engine, prompts: list[list[int]]) -> None:
        likeliest = generate(engine, 1, prompts[0], 1)[0]
        barred = SamplingParams(min_tokens=1, stop_tokens=(likeliest,))
        engine.reset()
        assert generate(engine, 1, prompts[0], 1, barred) != [likeliest]
        # Tokens from before a loss count.
        known = [*prompts[0], likeliest]
        engine.reset()
        free = generate(engine, 1, known, 1)
        engine.reset()
        after = SamplingParams(min_tokens=1, stop_tokens=tuple(free))
        assert generate(engine, 1, known, 1, after, len(prompts[0])) == free

    def test_stop_tokens_are_drawn_and_told_like_others(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        """The router says where an answer ends; what it has planned beyond that is computed."""
        free = generate(engine, 1, prompts[0], 6)
        engine.reset()
        stopped = SamplingParams(stop_tokens=(free[1], free[3]))
        assert generate(engine, 2, prompts[0], 6, stopped) == free

    def test_bias_decides(self, engine: Engine, prompts: list[list[int]]) -> None:
        wanted = engine.describe().eos_token_ids[0]
        sampling = SamplingParams(logit_bias=((wanted, 100.0),))
        assert generate(engine, 1, prompts[0], 2, sampling) == [wanted, wanted]
        engine.reset()
        likeliest = generate(engine, 1, prompts[0], 1)[0]
        engine.reset()
        barred = SamplingParams(logit_bias=((likeliest, -100.0),))
        assert generate(engine, 1, prompts[0], 1, barred) != [likeliest]

    def test_penalties_see_generated_tokens_only(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        likeliest = generate(engine, 1, prompts[0], 1)[0]
        engine.reset()
        sampling = SamplingParams(frequency_penalty=2.0, presence_penalty=100.0)
        drawn = generate(engine, 1, prompts[0], 8, sampling)
        assert drawn[0] == likeliest
        assert len(set(drawn)) == len(drawn)

    def test_prompts_are_scored_or_it_is_refused_by_name(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt, scored = prompts[0], SamplingParams(prompt_logprobs=True)
        if refuses(engine, prompt, scored, "prompt_logprobs"):
            assert len(generate(engine, 1, prompt, 1)) == 1
            return
        outcome = engine.step(Plan(admits=[admit(1, prompt, scored)], work=[(1, len(prompt))]))
        assert len(outcome.prompt_logprobs[1].logprobs) == len(prompt) - 1

    def test_ranks_count_likelier_tokens(self, engine: Engine, prompts: list[list[int]]) -> None:
        prompt, vocabulary = prompts[0], engine.describe().vocab_size
        everything = SamplingParams(logprobs=True, top_logprobs=vocabulary, ranks=True)
        if refuses(engine, prompt, everything, "ranks"):
            return
        found: list[int] = []
        for seed in range(6):
            engine.reset()
            warm = replace(everything, temperature=5.0 if seed else 0.0, seed=seed)
            outcome = engine.step(Plan(admits=[admit(1, prompt, warm)], work=[(1, len(prompt))]))
            told = outcome.logprobs[1]
            assert told.logprob == pytest.approx(by_token(outcome, 1)[outcome.tokens[0]])
            low, high = rank_bounds(told.logprob, told.top_values)
            assert low <= told.rank <= high
            found.append(told.rank)
        assert found[0] == 1
        assert max(found) > 1
        engine.reset()
        unasked = admit(1, prompt, SamplingParams(logprobs=True))
        outcome = engine.step(Plan(admits=[unasked], work=[(1, len(prompt))]))
        assert outcome.logprobs[1].rank == 0

    @pytest.mark.parametrize("plain", [GREEDY, SEEDED], ids=["greedy", "sampled"])
    def test_a_mark_is_found_where_it_was_asked_for(
        self, engine: Engine, prompts: list[list[int]], plain: SamplingParams
    ) -> None:
        marked = replace(plain, watermark=MARK)
        if refuses(engine, prompts[0], marked, "watermark"):
            return
        for prompt in prompts[:2]:
            engine.reset()
            without = [prompt[-1], *generate(engine, 1, prompt, 24, plain)]
            assert detect(without, MARK).z < 3
            engine.reset()
            text = [prompt[-1], *generate(engine, 1, prompt, 24, marked)]
            assert all(is_green(text[n], text[n + 1], MARK) for n in range(24))
            assert detect(text, MARK).z > 3
            assert detect(text, replace(MARK, key=1)).z < 3

    @pytest.mark.parametrize("plain", [GREEDY, SEEDED], ids=["greedy", "sampled"])
    def test_a_mark_goes_on_anywhere(
        self, engine: Engine, prompts: list[list[int]], plain: SamplingParams
    ) -> None:
        """In chunks, beside sequences with another mark and none, and after a loss."""
        first, second, third = prompts[:3]
        marked = replace(plain, watermark=MARK)
        if refuses(engine, first, marked, "watermark"):
            return
        alone = generate(engine, 1, first, 8, marked)
        engine.reset()
        unmarked = generate(engine, 2, second, 6, plain)
        engine.reset()
        other = admit(3, third, replace(marked, watermark=replace(MARK, key=9)))
        engine.step(Plan(admits=[admit(1, first, marked)], work=[(1, 7)]))
        beside = Plan(
            admits=[admit(2, second, plain), other],
            work=[(3, len(third)), (1, len(first) - 7), (2, len(second))],
        )
        steps = [engine.step(beside)]
        steps += [engine.step(Plan(work=[(2, 1), (1, 1), (3, 1)])) for _ in range(5)]
        together = [dict(zip(step.sequences, step.tokens, strict=True)) for step in steps]
        assert [drawn[1] for drawn in together] == alone[:6]
        assert [drawn[2] for drawn in together] == unmarked
        engine.reset()
        resumed = generate(engine, 4, [*first, *alone[:5]], 3, marked, len(first))
        assert resumed == alone[5:]

    def test_a_mark_leaves_logprobs_raw(self, engine: Engine, prompts: list[list[int]]) -> None:
        prompt, vocabulary = prompts[0], engine.describe().vocab_size
        sampling = SamplingParams(logprobs=True, top_logprobs=vocabulary)
        if refuses(engine, prompt, replace(sampling, watermark=MARK), "watermark"):
            return
        told = []
        for watermark in (None, MARK):
            engine.reset()
            made = admit(1, prompt, replace(sampling, watermark=watermark))
            told.append(engine.step(Plan(admits=[made], work=[(1, len(prompt))])))
        raw, marked = by_token(told[0], 1), by_token(told[1], 1)
        assert marked == pytest.approx(raw, abs=1e-3)
        assert told[1].logprobs[1].logprob == pytest.approx(raw[told[1].tokens[0]], abs=1e-3)
        assert is_green(prompt[-1], told[1].tokens[0], MARK)
