"""SmolLM2 in float32 against ``transformers.generate``, whose answers are in a file."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import Admit, Engine, EngineOptions, Plan, SamplingParams
from tests.heavy import reference
from tests.heavy.models import smollm2_folder, smollm2_gguf
from tests.heavy.reference import agreed

TOGETHER = 8


def make(**changes: Any) -> Engine:
    given = {
        "model": smollm2_folder(),
        "model_id": "smollm2",
        "kv_tokens": 4096,
        "sequences_max": TOGETHER,
        "step_tokens_max": 128,
        "device": "cpu",
        "dtype": "float32",
        **changes,
    }
    return load("jax", EngineOptions(**given), lambda _fraction: None)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = make()
    yield made
    made.close()


def answer(engine: Engine, prompts: list[list[int]], count: int) -> tuple[Any, Any]:
    """Tokens of all prompts, which prefill and decode together, and their first logprobs."""
    sampling = SamplingParams(logprobs=True)
    drawn: dict[int, list[int]] = {}
    logprobs: dict[int, float] = {}
    for number, prompt in enumerate(prompts):
        work = [*((n, 1) for n in drawn), (number, len(prompt))]
        admits = [Admit(number, prompt, len(prompt), sampling)]
        outcome = engine.step(Plan(admits=admits, work=work))
        logprobs[number] = outcome.logprobs[number].logprob
        for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn.setdefault(sequence, []).append(token)
    while min(map(len, drawn.values())) < count:
        outcome = engine.step(Plan(work=[(n, 1) for n in drawn]))
        for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[sequence].append(token)
    engine.reset()
    return [drawn[n][:count] for n in range(len(prompts))], list(logprobs.values())


def test_32_prompts_of_64_tokens_are_as_the_reference(engine: Engine) -> None:
    entries = reference.read()
    assert len(entries) == 32
    total = 0
    for start in range(0, len(entries), TOGETHER):
        part = entries[start : start + TOGETHER]
        found, logprobs = answer(engine, [entry["prompt"] for entry in part], reference.COUNT)
        expected = [entry["logprob"] for entry in part]
        np.testing.assert_allclose(logprobs, expected, atol=1e-3)
        total += sum(map(agreed, found, part))
    # Near ties are rare: nearly all was compared.
    assert total > 0.95 * 32 * reference.COUNT


def test_a_gguf_file_answers_as_the_folder(engine: Engine) -> None:
    """The folder has the file's weights rounded to bfloat16, so clear answers are the same."""
    entries = reference.read()[:4]
    gguf = make(model=smollm2_gguf(), sequences_max=4)
    try:
        assert gguf.describe().vocab_size == engine.describe().vocab_size
        assert set(gguf.describe().eos_token_ids) == set(engine.describe().eos_token_ids)
        found, logprobs = answer(gguf, [entry["prompt"] for entry in entries], 8)
    finally:
        gguf.close()
    np.testing.assert_allclose(logprobs, [entry["logprob"] for entry in entries], atol=0.05)
    same = [tokens == entry["tokens"][:8] for tokens, entry in zip(found, entries, strict=True)]
    assert sum(same) >= 3


def test_bfloat16_answers_the_clear_ones(engine: Engine) -> None:
    entries = reference.read()[:4]
    made = make(dtype="bfloat16", sequences_max=4)
    try:
        assert made.describe().dtype == "bfloat16"
        assert made.describe().weight_bytes < 0.51 * engine.describe().weight_bytes
        _, logprobs = answer(made, [entry["prompt"] for entry in entries], 1)
    finally:
        made.close()
    np.testing.assert_allclose(logprobs, [entry["logprob"] for entry in entries], atol=0.15)
