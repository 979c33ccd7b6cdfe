"""Driving an engine by hand: what the tests of all engines share."""

from collections.abc import Sequence

from shards.engines.base import Admit, Engine, Outcome, Plan, SamplingParams

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


def by_token(outcome: Outcome, sequence: int) -> dict[int, float]:
    """Logprobs of the whole vocabulary at one position."""
    told = outcome.logprobs[sequence]
    return dict(zip(told.top_tokens, told.top_values, strict=True))


def shareable(engine: Engine, length: int) -> int:
    """The longest shareable prefix up to that length."""
    return length // engine.describe().page_tokens * engine.describe().page_tokens


def fill(engine: Engine, sequence: int, tokens: Sequence[int], drops: Sequence[int] = ()) -> None:
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
