"""vLLM with SmolLM2 in float32, against ``transformers``: the same tokens and log probabilities."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import Engine, EngineOptions, Plan, SamplingParams
from tests.engines.driving import admit
from tests.heavy.models import smollm2_folder

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS, NEW = 32, 64
# Where the two likeliest tokens are nearer than this, rounding may decide.
MARGIN = 1e-3
TEXT = (
    "The railway came to the valley in the spring, and with it came the post, the papers, and a"
    " doctor. Water boils at a lower temperature on a mountain because the pressure of the air is"
    " lower there. Once upon a time there was a small engine that could not climb the hill, until"
    " one day it found that it need not. The capital of France is Paris, of Austria it is Vienna,"
    " and of Japan it is Tokyo. def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + 1"
    " Most bread is made of flour, water, salt and time. The moon turns around the earth in about"
    " four weeks, and always shows it the same face. Nobody knows who first made cheese."
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = EngineOptions(
        smollm2_folder(),
        "smollm2",
        kv_tokens=8192,
        sequences_max=PROMPTS,
        step_tokens_max=512,
        dtype="float32",
        extra=(("eager", "1"),),
    )
    engine = load("vllm", options, lambda _fraction: None)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Windows of a text, each of another length."""
    tokens = Tokenizer.from_file(str(smollm2_folder() / "tokenizer.json")).encode(TEXT).ids
    return [tokens[3 * n : 3 * n + 8 + n % 9] for n in range(PROMPTS)]


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]]) -> tuple[list[list[int]], list[np.ndarray]]:
    """What ``transformers.generate`` says: the tokens, and the logits [new, vocabulary] of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(made.logits, dim=1).numpy()
    return made.sequences[:, longest:].tolist(), list(logits)


def test_greedy_tokens_are_those_of_transformers(
    engine: Engine,
    prompts: list[list[int]],
    reference: tuple[list[list[int]], list[np.ndarray]],
) -> None:
    expected, logits = reference
    numbers = range(1, PROMPTS + 1)
    plan = Plan(
        admits=[admit(n, prompts[n - 1]) for n in numbers],
        work=[(n, len(prompts[n - 1])) for n in numbers],
    )
    engine.reset()
    drawn: dict[int, list[int]] = {n: [] for n in numbers}
    for _ in range(NEW):
        outcome = engine.step(plan)
        for n, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[n].append(token)
        plan = Plan(work=[(n, 1) for n in numbers])
    compared = 0
    for n in numbers:
        place = next((i for i in range(NEW) if drawn[n][i] != expected[n - 1][i]), NEW)
        compared += place
        if place < NEW:
            second, first = np.partition(logits[n - 1][place], -2)[-2:]
            assert first - second < MARGIN, f"prompt {n} differs at {place}"
    # Near ties are few: nearly everything was compared.
    assert compared > 0.9 * PROMPTS * NEW


def test_log_probabilities_are_those_of_transformers(
    engine: Engine,
    prompts: list[list[int]],
    reference: tuple[list[list[int]], list[np.ndarray]],
) -> None:
    _, logits = reference
    engine.reset()
    asked = SamplingParams(logprobs=True, top_logprobs=20)
    for n, prompt in enumerate(prompts[:8]):
        outcome = engine.step(
            Plan(admits=[admit(n + 1, prompt, asked)], work=[(n + 1, len(prompt))])
        )
        raw = torch.log_softmax(torch.from_numpy(logits[n][0]), dim=-1).numpy()
        told = outcome.logprobs[n + 1]
        assert told.logprob == pytest.approx(raw[outcome.tokens[0]], abs=1e-3)
        assert list(told.top_values) == pytest.approx(raw[list(told.top_tokens)], abs=1e-3)
        assert set(told.top_tokens[:5]) == set(np.argsort(raw)[::-1][:5].tolist())
