"""vLLM with SmolLM2 in float32, against ``transformers``: the same tokens and log probabilities."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shards.engines import load
from shards.engines.base import Engine, EngineOptions, Plan, SamplingParams
from tests.engines.driving import admit
from tests.heavy import reference
from tests.heavy.models import smollm2_folder

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

# Of how many prompts the log probabilities of whole vocabularies are computed here.
TOLD = 8


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = EngineOptions(
        smollm2_folder(),
        "smollm2",
        kv_tokens=8192,
        sequences_max=len(reference.read()),
        step_tokens_max=512,
        dtype="float32",
        extra=(("eager", "1"),),
    )
    engine = load("vllm", options, lambda _fraction: None)
    yield engine
    engine.close()


def test_greedy_tokens_are_those_of_transformers(engine: Engine) -> None:
    """All prompts in one batch; the file has what ``generate`` says to each by itself."""
    entries = reference.read()
    assert len(entries) == 32
    asked = list(enumerate((entry["prompt"] for entry in entries), start=1))
    plan = Plan(
        admits=[admit(n, prompt) for n, prompt in asked],
        work=[(n, len(prompt)) for n, prompt in asked],
    )
    engine.reset()
    drawn: dict[int, list[int]] = {n: [] for n, _ in asked}
    for _ in range(reference.COUNT):
        outcome = engine.step(plan)
        for n, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[n].append(token)
        plan = Plan(work=[(n, 1) for n, _ in asked])
    assert {len(tokens) for tokens in drawn.values()} == {reference.COUNT}
    compared = sum(map(reference.agreed, drawn.values(), entries))
    # Near ties are few: nearly everything was compared.
    assert compared > 0.9 * len(entries) * reference.COUNT


def test_first_log_probabilities_are_those_of_the_reference(engine: Engine) -> None:
    asked = SamplingParams(logprobs=True)
    entries = dict(enumerate(reference.read(), start=1))
    engine.reset()
    outcome = engine.step(
        Plan(
            admits=[admit(n, entry["prompt"], asked) for n, entry in entries.items()],
            work=[(n, len(entry["prompt"])) for n, entry in entries.items()],
        )
    )
    assert outcome.sequences == list(entries)
    found = [outcome.logprobs[n].logprob for n in entries]
    assert found == pytest.approx([entry["logprob"] for entry in entries.values()], abs=1e-3)


def test_log_probabilities_are_those_of_transformers(engine: Engine) -> None:
    """Of the likeliest tokens, too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    engine.reset()
    asked = SamplingParams(logprobs=True, top_logprobs=20)
    for n, entry in enumerate(reference.read()[:TOLD]):
        prompt = entry["prompt"]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        raw = torch.log_softmax(logits, dim=-1).numpy()
        outcome = engine.step(
            Plan(admits=[admit(n + 1, prompt, asked)], work=[(n + 1, len(prompt))])
        )
        told = outcome.logprobs[n + 1]
        assert told.logprob == pytest.approx(raw[outcome.tokens[0]], abs=1e-3)
        assert list(told.top_values) == pytest.approx(raw[list(told.top_tokens)], abs=1e-3)
        assert set(told.top_tokens[:5]) == set(np.argsort(raw)[::-1][:5].tolist())
