"""What every engine must do: one suite, run unchanged for each of them.

A subclass gives the fixtures ``engine`` (empty at each test) and ``prompts`` (a few different token
lists of 20 to 60 tokens, none a prefix of another).
"""

import math
from collections.abc import Sequence

import pytest

from shards.engines.base import Admit, Engine, Outcome, Plan, PlanError, SamplingParams

GREEDY = SamplingParams()
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=42)


def admit(
    sequence: int,
    tokens: Sequence[int],
    sampling: SamplingParams = GREEDY,
    *,
    prompt_len: int = 0,
    share_from: int = 0,
    share_len: int = 0,
) -> Admit:
    return Admit(sequence, tokens, prompt_len or len(tokens), sampling, share_from, share_len)


def decode(engine: Engine, sequence: int, steps: int) -> list[int]:
    """The next tokens of one sequence."""
    return [engine.step(Plan(work=[(sequence, 1)])).tokens[0] for _ in range(steps)]


def generate(
    engine: Engine,
    sequence: int,
    tokens: Sequence[int],
    count: int,
    sampling: SamplingParams = GREEDY,
    prompt_len: int = 0,
) -> list[int]:
    """Admits a sequence, computes it at once, and draws ``count`` tokens."""
    made = admit(sequence, tokens, sampling, prompt_len=prompt_len)
    first = engine.step(Plan(admits=[made], work=[(sequence, len(tokens))]))
    return first.tokens + decode(engine, sequence, count - 1)


class EngineContract:
    def test_describes_itself(self, engine: Engine) -> None:
        info = engine.describe()
        assert info == engine.describe()
        assert info.kv_tokens > 0
        assert info.sequences_max > 0
        assert info.step_tokens_max > 0
        assert 0 < info.length_max <= info.kv_tokens
        assert info.page_tokens > 0
        assert info.eos_token_ids
        assert all(0 <= token < info.vocab_size for token in info.eos_token_ids)

    def test_gives_tokenizer_files_that_can_be_read(self, engine: Engine) -> None:
        from tokenizers import Tokenizer

        files = engine.tokenizer_files()
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        text = "Zwölf 🚂 fahren\n  nach 日本."
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_a_plan_without_work_draws_nothing(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        assert engine.step(Plan()) == Outcome()
        assert engine.step(Plan(admits=[admit(1, prompts[0])])) == Outcome()
        assert engine.step(Plan(drops=[1])) == Outcome()

    def test_same_log_same_tokens(self, engine: Engine, prompts: list[list[int]]) -> None:
        def run() -> list[tuple[list[int], list[int]]]:
            engine.reset()
            seen = []
            for index, prompt in enumerate(prompts):
                sampling = SEEDED if index % 2 else GREEDY
                work = [(earlier + 1, 1) for earlier in range(index)]
                plan = Plan(
                    admits=[admit(index + 1, prompt, sampling)],
                    work=[*work, (index + 1, len(prompt))],
                )
                outcome = engine.step(plan)
                seen.append((outcome.sequences, outcome.tokens))
            return seen

        assert run() == run()

    def test_draws_only_when_all_known_tokens_are_computed(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        prompt = prompts[0]
        half = engine.step(Plan(admits=[admit(1, prompt)], work=[(1, 10)]))
        assert half == Outcome()
        rest = engine.step(Plan(work=[(1, len(prompt) - 10)]))
        assert rest.sequences == [1]
        assert len(rest.tokens) == 1

    def test_chunked_prefill_is_as_unchunked(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        whole = generate(engine, 1, prompts[0], 8)
        engine.step(Plan(drops=[1], admits=[admit(2, prompts[0])], work=[(2, 7)]))
        engine.step(Plan(work=[(2, 11)]))
        first = engine.step(Plan(work=[(2, len(prompts[0]) - 18)]))
        assert first.tokens + decode(engine, 2, 7) == whole

    def test_alone_is_as_in_company(self, engine: Engine, prompts: list[list[int]]) -> None:
        alone = [generate(engine, 1 + n, prompt, 6) for n, prompt in enumerate(prompts)]
        engine.reset()
        numbers = range(1, len(prompts) + 1)
        plan = Plan(
            admits=[admit(n, prompts[n - 1]) for n in numbers],
            work=[(n, len(prompts[n - 1])) for n in numbers],
        )
        outcomes = [engine.step(plan)]
        outcomes += [engine.step(Plan(work=[(n, 1) for n in numbers])) for _ in range(5)]
        together = [dict(zip(o.sequences, o.tokens, strict=True)) for o in outcomes]
        assert [[drawn[n] for drawn in together] for n in numbers] == alone

    def test_shared_prefix_is_as_computed(self, engine: Engine, prompts: list[list[int]]) -> None:
        donor, share = prompts[0], _share(engine, 16)
        tokens = [*donor[:share], *prompts[1]]
        computed = generate(engine, 1, tokens, 8)
        engine.reset()
        engine.step(Plan(admits=[admit(1, donor)], work=[(1, len(donor))]))
        made = admit(2, tokens, share_from=1, share_len=share)
        first = engine.step(Plan(admits=[made], work=[(2, len(tokens) - share), (1, 1)]))
        drawn = dict(zip(first.sequences, first.tokens, strict=True))[2]
        assert [drawn, *decode(engine, 2, 3)] == computed[:4]
        # What is left of it does not depend on the donor.
        engine.step(Plan(drops=[1]))
        assert decode(engine, 2, 4) == computed[4:]

    def test_generated_tokens_can_be_shared(self, engine: Engine, prompts: list[list[int]]) -> None:
        drawn = generate(engine, 1, prompts[0], 20)
        known = [*prompts[0], *drawn]
        share = _share(engine, len(known) - 2)
        tokens = [*known[:share], *prompts[1][:5]]
        made = admit(2, tokens, share_from=1, share_len=share)
        outcome = engine.step(Plan(admits=[made], work=[(2, len(tokens) - share)]))
        engine.reset()
        assert outcome.tokens == generate(engine, 3, tokens, 1)

    def test_a_drop_makes_room(self, engine: Engine, prompts: list[list[int]]) -> None:
        info = engine.describe()
        for sequence in range(1, info.sequences_max + 1):
            engine.step(Plan(admits=[admit(sequence, prompts[0])]))
        one_more = Plan(admits=[admit(info.sequences_max + 1, prompts[0])])
        with pytest.raises(PlanError, match="sequences_max"):
            engine.step(one_more)
        engine.step(Plan(drops=[1], admits=one_more.admits))

    def test_over_budget_is_refused_and_changes_nothing(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        expected = generate(engine, 1, prompts[0], 4)
        engine.reset()
        limit = engine.describe().step_tokens_max
        long = (prompts[1] * (limit // 20 + 2))[: limit + 1]
        tokens = generate(engine, 1, prompts[0], 2)
        with pytest.raises(PlanError, match="step_tokens_max"):
            engine.step(Plan(drops=[1], admits=[admit(2, long)], work=[(2, limit + 1)]))
        with pytest.raises(PlanError, match="not resident"):
            engine.step(Plan(work=[(2, 1)]))
        assert tokens + decode(engine, 1, 2) == expected

    def test_kv_budget_counts_shared_tokens_once(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        info = engine.describe()
        length = min(info.length_max, info.kv_tokens // 2) // info.page_tokens * info.page_tokens
        tokens = (prompts[0] * (length // 20 + 2))[:length]
        _fill(engine, 1, tokens)
        shared = admit(2, tokens, share_from=1, share_len=length - info.page_tokens)
        engine.step(Plan(admits=[shared], work=[(2, info.page_tokens)]))
        left = info.kv_tokens - length - info.page_tokens
        sequence = 3
        while left > 0:
            part = min(left, length)
            _fill(engine, sequence, tokens[:part])
            left -= part
            sequence += 1
        with pytest.raises(PlanError, match="kv_tokens"):
            _fill(engine, sequence + 1, prompts[1])
        # The donor's cells stay as long as the other sequence has them.
        with pytest.raises(PlanError, match="kv_tokens"):
            _fill(engine, sequence + 2, prompts[1], drops=[1])
        _fill(engine, sequence + 3, prompts[1], drops=[1, 2])

    @pytest.mark.parametrize("case", range(9))
    def test_what_breaks_the_contract_is_refused(
        self, engine: Engine, prompts: list[list[int]], case: int
    ) -> None:
        prompt = prompts[0]
        engine.step(Plan(admits=[admit(1, prompt)], work=[(1, 10)]))
        refused = [
            Plan(work=[(9, 1)]),
            Plan(drops=[9]),
            Plan(admits=[admit(1, prompt)]),
            Plan(work=[(1, len(prompt))]),
            Plan(work=[(1, 0)]),
            Plan(work=[(1, 1), (1, 1)]),
            Plan(admits=[admit(2, prompt, share_from=1, share_len=_share(engine, 16))]),
            Plan(admits=[admit(2, prompt, share_from=9, share_len=_share(engine, 8))]),
            Plan(admits=[admit(2, [engine.describe().vocab_size])]),
        ]
        with pytest.raises(PlanError):
            engine.step(refused[case])
        assert engine.step(Plan(work=[(1, len(prompt) - 10)])).sequences == [1]

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
    def test_goes_on_anywhere(
        self, engine: Engine, prompts: list[list[int]], sampling: SamplingParams
    ) -> None:
        prompt = prompts[1]
        unbroken = generate(engine, 1, prompt, 12, sampling)
        engine.reset()
        before = generate(engine, 7, prompt, 5, sampling)
        engine.reset()
        known = [*prompt, *before]
        assert generate(engine, 8, known, 7, sampling, len(prompt)) == unbroken[5:]

    def test_penalties_go_on_anywhere(self, engine: Engine, prompts: list[list[int]]) -> None:
        sampling = SamplingParams(
            temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, seed=3, min_tokens=9
        )
        unbroken = generate(engine, 1, prompts[0], 12, sampling)
        engine.reset()
        known = [*prompts[0], *unbroken[:6]]
        assert generate(engine, 2, known, 6, sampling, len(prompts[0])) == unbroken[6:]

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

    def test_reset_forgets(self, engine: Engine, prompts: list[list[int]]) -> None:
        engine.step(Plan(admits=[admit(1, prompts[0])], work=[(1, 5)]))
        engine.reset()
        with pytest.raises(PlanError, match="not resident"):
            engine.step(Plan(work=[(1, 1)]))
        assert len(generate(engine, 1, prompts[0], 1)) == 1


def _share(engine: Engine, length: int) -> int:
    """The longest shareable prefix up to that length."""
    return length // engine.describe().page_tokens * engine.describe().page_tokens


def _fill(engine: Engine, sequence: int, tokens: Sequence[int], drops: Sequence[int] = ()) -> None:
    """Makes a sequence resident and computes it, in as few steps as the budget allows."""
    limit = engine.describe().step_tokens_max
    engine.step(
        Plan(
            drops=drops,
            admits=[admit(sequence, tokens)],
            work=[(sequence, min(limit, len(tokens)))],
        )
    )
    for start in range(limit, len(tokens), limit):
        engine.step(Plan(work=[(sequence, min(limit, len(tokens) - start))]))
