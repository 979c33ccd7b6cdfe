"""The part of the contract that is about drawing: what a request may ask of each token."""

import math

import pytest

from shards.engines.base import Engine, Plan, SamplingParams
from tests.engines.driving import admit, generate


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
