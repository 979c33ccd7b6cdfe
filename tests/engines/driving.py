"""Driving an engine by hand: what the tests of all engines share."""

import time
from collections.abc import Callable, Sequence

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


def overlapping(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Plan]:
    """Steps in which sequences of all kinds come, draw, share and go, without a pause."""
    features = engine.describe().features
    first, second, third = prompts[:3]
    warm = SamplingParams(temperature=0.8, seed=5)
    penal = told = SEEDED
    if {"penalties", "min_tokens"} <= set(features):
        penal = SamplingParams(temperature=0.7, seed=6, repetition_penalty=1.2, min_tokens=3)
    if "logprobs" in features:
        told = SamplingParams(temperature=0.6, seed=7, logprobs=True, top_logprobs=2)
    share = shareable(engine, len(first))
    known = [*first[:share], *second]
    fifth = admit(5, known, told, share_from=1 if share else 0, share_len=share)
    return [
        Plan(admits=[admit(1, first)], work=[(1, len(first))]),
        Plan(admits=[admit(2, second, warm)], work=[(1, 1), (2, len(second))]),
        Plan(work=[(2, 1), (1, 1)]),
        Plan(admits=[admit(3, third, SEEDED)], work=[(1, 1), (2, 1), (3, 10)]),
        Plan(work=[(3, len(third) - 10), (1, 1), (2, 1)]),
        Plan(work=[(1, 1), (2, 1), (3, 1)]),
        Plan(drops=[2], admits=[admit(4, second, penal)], work=[(1, 1), (3, 1), (4, len(second))]),
        *[Plan(work=[(1, 1), (3, 1), (4, 1)])] * 4,
        Plan(admits=[fifth], work=[(1, 1), (5, len(known) - share), (4, 1), (3, 1)]),
        Plan(work=[(5, 1), (3, 1)]),
        Plan(drops=[4, 3], work=[(5, 1), (1, 1)]),
        *[Plan(work=[(1, 1), (5, 1)])] * 3,
        Plan(drops=[1, 5]),
    ]


def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition that another thread brings about."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        time.sleep(0.002)
