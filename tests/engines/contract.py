"""What every engine must do: one suite, run unchanged for each of them.

A subclass gives the fixtures ``engine`` (empty at each test) and ``prompts`` (a few different token
lists of 20 to 60 tokens, none a prefix of another).

What else is in a batch may change an engine's logits by rounding, because its kernels add up in
another order. An engine that claims ``batch_invariant`` promises equality to the last bit, and is
held to it; of the others the suite measures the difference, tells it, and bounds it.
"""

import math
from collections import deque
from collections.abc import Callable

import pytest

from shards.engines.base import (
    STARTED_MAX,
    Engine,
    FeatureError,
    Outcome,
    Plan,
    PlanError,
    SamplingParams,
    Started,
)
from tests.engines.contract_sampling import SamplingContract
from tests.engines.driving import (
    GREEDY,
    SEEDED,
    admit,
    by_token,
    decode,
    fill,
    generate,
    overlapping,
    shareable,
)

INVARIANT = "batch_invariant"
# Every word that an engine may use; requests are matched with them.
FEATURES = {
    *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p", "prefix_sharing"),
    *("grammar", "lora", "embeddings", "prompt_logprobs", "ranks", "watermark", INVARIANT),
}
# How far rounding may move a logprob in company, in nats. What is wrong moves them by more.
ROUNDING_MAX = 2.0


class EngineContract(SamplingContract):
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

    def test_declares_features_by_their_names(self, engine: Engine) -> None:
        info = engine.describe()
        assert set(info.features) <= FEATURES
        assert len(set(info.features)) == len(info.features)
        assert ("lora" in info.features) == bool(info.adapters)
        assert ("embeddings" in info.features) == (info.embed_tokens_max > 0)

    def test_refuses_by_name_to_embed_if_it_cannot(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        info = engine.describe()
        if "embeddings" in info.features:
            (vector,) = engine.embed([prompts[0]])
            assert math.fsum(value * value for value in vector) == pytest.approx(1.0, abs=1e-3)
            return
        with pytest.raises(FeatureError, match=f"{info.engine}.*embeddings") as caught:
            engine.embed([prompts[0]])
        assert "\n" not in str(caught.value)

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

    def test_neighbours_change_no_more_than_is_declared(
        self,
        engine: Engine,
        prompts: list[list[int]],
        record_property: Callable[[str, object], None],
    ) -> None:
        """The logprobs of one sequence, alone and among others that come, decode and go."""
        vocabulary, prompt = engine.describe().vocab_size, prompts[0]
        sampling = SamplingParams(logprobs=True, top_logprobs=vocabulary)
        first = Plan(admits=[admit(1, prompt, sampling)], work=[(1, len(prompt))])
        alone = [engine.step(plan) for plan in (first, *[Plan(work=[(1, 1)])] * 4)]
        engine.reset()
        second, third = prompts[1], prompts[2]
        engine.step(Plan(admits=[admit(2, second)], work=[(2, len(second))]))
        among = [
            Plan(admits=first.admits, work=[(2, 1), (1, len(prompt))]),
            Plan(admits=[admit(3, third)], work=[(1, 1), (3, len(third) - 1), (2, 1)]),
            Plan(work=[(3, 1), (2, 1), (1, 1)]),
            Plan(drops=[2], work=[(1, 1), (3, 1)]),
            Plan(drops=[3], work=[(1, 1)]),
        ]
        together = [engine.step(plan) for plan in among]
        change = 0.0
        for one, other in zip(alone, together, strict=True):
            at = other.sequences.index(1)
            assert one.tokens == [other.tokens[at]]
            expected, seen = by_token(one, 1), by_token(other, 1)
            change = max(change, *(abs(expected[token] - seen[token]) for token in expected))
        record_property("logprobs_changed_by_neighbours", change)
        if INVARIANT in engine.describe().features:
            assert change == 0.0
        else:
            assert change < ROUNDING_MAX

    def test_shared_prefix_is_as_computed(self, engine: Engine, prompts: list[list[int]]) -> None:
        donor, share = prompts[0], shareable(engine, 16)
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
        share = shareable(engine, len(known) - 2)
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
        fill(engine, 1, tokens)
        shared = admit(2, tokens, share_from=1, share_len=length - info.page_tokens)
        engine.step(Plan(admits=[shared], work=[(2, info.page_tokens)]))
        left = info.kv_tokens - length - info.page_tokens
        sequence = 3
        while left > 0:
            part = min(left, length)
            fill(engine, sequence, tokens[:part])
            left -= part
            sequence += 1
        with pytest.raises(PlanError, match="kv_tokens"):
            fill(engine, sequence + 1, prompts[1])
        # The donor's cells stay as long as the other sequence has them.
        with pytest.raises(PlanError, match="kv_tokens"):
            fill(engine, sequence + 2, prompts[1], drops=[1])
        fill(engine, sequence + 3, prompts[1], drops=[1, 2])

    @pytest.mark.parametrize("case", range(9))
    def test_what_breaks_the_contract_is_refused(
        self, engine: Engine, prompts: list[list[int]], case: int
    ) -> None:
        prompt = prompts[0]
        engine.step(Plan(admits=[admit(1, prompt)], work=[(1, 10)]))
        page = engine.describe().page_tokens
        share = -(-16 // page) * page  # whole pages, and more than is computed
        long = (prompt * (share // len(prompt) + 2))[: share + 1]
        refused = [
            Plan(work=[(9, 1)]),
            Plan(drops=[9]),
            Plan(admits=[admit(1, prompt)]),
            Plan(work=[(1, len(prompt))]),
            Plan(work=[(1, 0)]),
            Plan(work=[(1, 1), (1, 1)]),
            Plan(admits=[admit(2, long, share_from=1, share_len=share)]),
            Plan(admits=[admit(2, long, share_from=9, share_len=share)]),
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

    def test_goes_on_beside_others_and_from_a_shared_prefix(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        """What a router does after a loss: all tokens so far, beside a neighbour that has some."""
        prompt = prompts[2]
        unbroken = generate(engine, 1, prompt, 10, SEEDED)
        engine.reset()
        share, known = shareable(engine, len(prompt) - 1), [*prompt, *unbroken[:4]]
        engine.step(Plan(admits=[admit(1, prompt)], work=[(1, len(prompt))]))
        made = admit(
            2, known, SEEDED, prompt_len=len(prompt), share_from=1 if share else 0, share_len=share
        )
        outcome = engine.step(Plan(admits=[made], work=[(1, 1), (2, len(known) - share)]))
        drawn = [dict(zip(outcome.sequences, outcome.tokens, strict=True))[2]]
        assert drawn + decode(engine, 2, 5) == unbroken[4:]

    def test_penalties_go_on_anywhere(self, engine: Engine, prompts: list[list[int]]) -> None:
        sampling = SamplingParams(
            temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, seed=3, min_tokens=9
        )
        unbroken = generate(engine, 1, prompts[0], 12, sampling)
        engine.reset()
        known = [*prompts[0], *unbroken[:6]]
        assert generate(engine, 2, known, 6, sampling, len(prompts[0])) == unbroken[6:]

    def test_steps_that_overlap_are_as_one_after_the_other(
        self, engine: Engine, prompts: list[list[int]]
    ) -> None:
        """Sequences come, go, share and draw in every way while the step before is under way."""
        plans = overlapping(engine, prompts)
        expected = [engine.step(plan) for plan in plans]
        engine.reset()
        seen: list[Outcome] = []
        under_way: deque[Started] = deque()
        for plan in plans:
            if len(under_way) == STARTED_MAX:
                seen.append(under_way.popleft().finish())
            under_way.append(engine.start(plan))
            with pytest.raises(PlanError, match="not resident"):
                engine.start(Plan(work=[(99, 1)]))
        assert [*seen, *(step.finish() for step in under_way)] == expected

    def test_reset_forgets(self, engine: Engine, prompts: list[list[int]]) -> None:
        engine.step(Plan(admits=[admit(1, prompts[0])], work=[(1, 5)]))
        engine.reset()
        with pytest.raises(PlanError, match="not resident"):
            engine.step(Plan(work=[(1, 1)]))
        assert len(generate(engine, 1, prompts[0], 1)) == 1
