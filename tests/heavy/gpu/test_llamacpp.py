"""llama.cpp on an accelerator: the contract, and the answers of the processor.

``make test-gpu`` needs an accelerator, and these tests fail without one. To rehearse them,
``ROUNDHOUSE_GPU_TESTS_ON=cpu`` runs the same on the processor. ``ROUNDHOUSE_TEST_GGUF`` names a
file of SmolLM2-135M-Instruct in Q4_1 where its package is not installed.

On a GPU llama.cpp computes one row with another kernel than four, and those with another than
twenty, and each rounds in its own way: activations to 8 bits beside quantised weights, float32 to
TF32 in tensor cores, keys and values to float16. So equality, which the contract is about, is
asked of a model and of settings where nothing is rounded (``unrounded``), and what users run is
compared with the processor within what rounding was measured to change.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shards.engines.base import Engine, Plan, SamplingParams
from tests.engines.contract import EngineContract, admit
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.engines.contract_split import PART, SplitContract
from tests.engines.unrounded import make_llamacpp, make_unrounded
from tests.heavy.models import smollm2_gguf
from tests.heavy.tiny_gguf import tiny_llama_gguf

# Or cuBLAS multiplies float32 as TF32, which has 10 bits. It reads this once, when llama.cpp is
# imported at the earliest: by the first engine, so nothing above may import it.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

ON_CPU = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if ON_CPU else "gpu"
# One of the sizes that flash attention has kernels for.
FLASH_HEAD = 64
PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]
# What may be between two log probabilities of one token, in nats: where all is float32; ...
EQUAL = 1e-3
# ... where float32 is read as TF32 and the cache is float16: 0.03, with float16 on a processor; ...
ROUNDED = 0.1
# ... and where 8-bit activations meet Q4_1: 0.9 of the 20 likeliest, on an H100. What is computed
# wrong is off by 5 and more.
QUANTISED = 1.5
NEW_TOKENS = 24


def make(model: Path, device: str = DEVICE, **extra: object) -> Engine:
    return make_llamacpp(model, device, **extra)


@pytest.fixture(scope="module")
def unrounded() -> Iterator[Engine]:
    engine = make_unrounded(DEVICE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Engine]:
    engine = make(smollm2_gguf())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def smollm2_on_cpu() -> Iterator[Engine]:
    engine = make(smollm2_gguf(), "cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(smollm2: Engine) -> Tokenizer:
    return Tokenizer.from_str(smollm2.tokenizer_files()["tokenizer.json"].decode())


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, unrounded: Engine) -> Engine:
        unrounded.reset()
        return unrounded

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS


@pytest.fixture(scope="module")
def divided() -> Iterator[Engine]:
    engine = make_unrounded(DEVICE, 12 * PART, kv="split")
    yield engine
    engine.close()


class TestContractOfDividedCache(SplitContract):
    @pytest.fixture
    def engine(self, divided: Engine) -> Engine:
        divided.reset()
        return divided


def test_names_what_it_computes_on(unrounded: Engine) -> None:
    told = unrounded.describe().device
    assert told == "cpu" if ON_CPU else re.match(r"[a-z]+(:\d+)? \w+", told)


# Answers, and what another engine thinks of them -------------------------------------------------


def common(one: list[int], other: list[int]) -> int:
    """The length of what both begin with."""
    differs = (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differs, min(len(one), len(other)))


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Greedy answers with the log probability of each token.

    Each prompt comes in two chunks while those before it decode, and begins with what it shares
    with the first: products of few rows, of many, and of one at the end.
    """
    engine.reset()
    drawn: list[list[tuple[int, float]]] = [[] for _ in prompts]

    def step(plan: Plan) -> None:
        outcome = engine.step(plan)
        for number, token in zip(outcome.sequences, outcome.tokens, strict=True):
            drawn[number - 1].append((token, outcome.logprobs[number].logprob))

    def going() -> list[tuple[int, int]]:
        return [(n, 1) for n, own in enumerate(drawn, start=1) if 0 < len(own) < NEW_TOKENS]

    sampling = SamplingParams(logprobs=True)
    for number, prompt in enumerate(prompts, start=1):
        shared = common(prompt[:-2], prompts[0]) if number > 1 else 0
        first = (len(prompt) - shared) // 2
        made = admit(number, prompt, sampling, share_from=shared and 1, share_len=shared)
        step(Plan(admits=[made], work=[*going(), (number, first)]))
        step(Plan(work=[*going(), (number, len(prompt) - shared - first)]))
    while going():
        step(Plan(work=going()))
    return drawn


def assert_agrees(
    drawn: list[list[tuple[int, float]]], judge: Engine, prompts: list[list[int]], within: float
) -> None:
    """The judge computes the same texts, each at once: no token is far from what it would draw."""
    judge.reset()
    sampling = SamplingParams(prompt_logprobs=True, logprobs=True, top_logprobs=1)
    for number, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True), start=1):
        text = [*prompt, *(token for token, _ in answer)]
        plan = Plan(admits=[admit(number, text, sampling)], work=[(number, len(text))])
        told = judge.step(plan).prompt_logprobs[number]
        judge.step(Plan(drops=[number]))
        after = len(prompt) - told.start
        expected = np.array(told.logprobs[after:])
        best = np.array([likeliest[0][1] for likeliest in told.likeliest[after:]])
        seen = np.array([logprob for _, logprob in answer])
        assert len(seen) == len(expected) == NEW_TOKENS
        assert np.abs(seen - expected).max() < within
        # Of two log probabilities one may be too high and the other too low.
        assert (best - expected).max() < 2 * within


def test_float32_answers_as_the_processor(unrounded: Engine) -> None:
    other = make_unrounded("cpu")
    try:
        assert_agrees(answers(unrounded, PROMPTS), other, PROMPTS, EQUAL)
    finally:
        other.close()


def test_what_is_on_by_default_answers_as_the_processor() -> None:
    """Flash attention, a cache in float16; sixteen rows at most, so that there is TF32 as well."""
    prompts = [*PROMPTS, *(PROMPTS[0][:20] + prompt for prompt in PROMPTS)]
    model = tiny_llama_gguf(head_dim=FLASH_HEAD)
    engine, other = make(model), make(model, "cpu")
    try:
        assert_agrees(answers(engine, prompts), other, prompts, ROUNDED)
    finally:
        engine.close()
        other.close()


def test_embeddings_are_those_of_the_processor() -> None:
    vectors = []
    for device in (DEVICE, "cpu"):
        engine = make_unrounded(device, embeddings=1)
        vectors.append(np.array(engine.embed(PROMPTS)))
        engine.close()
    np.testing.assert_allclose(*vectors, atol=EQUAL)


# The real model, quantised: names say smollm2, so that -k can leave it out -----------------------

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of 100 degrees",
    "The sun rises in the east and sets in the",
    "One, two, three, four, five, six,",
    "The opposite of hot is",
    "Once upon a time, there was a little",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "The railway came to the valley in the spring, and with it came the",
)


def first_tokens(engine: Engine, prompts: list[list[int]]) -> list[dict[int, float]]:
    """Behind each prompt the 20 likeliest tokens, all computed at once."""
    engine.reset()
    sampling = SamplingParams(logprobs=True, top_logprobs=20)
    admits = [admit(n, prompt, sampling) for n, prompt in enumerate(prompts, start=1)]
    work = [(n, len(prompt)) for n, prompt in enumerate(prompts, start=1)]
    told = engine.step(Plan(admits=admits, work=work)).logprobs
    return [dict(zip(told[n].top_tokens, told[n].top_values, strict=True)) for n, _ in work]


def test_smollm2_thinks_as_on_the_processor(
    smollm2: Engine, smollm2_on_cpu: Engine, tokenizer: Tokenizer
) -> None:
    """The likeliest of each is among the likeliest of the other, and nearly as likely."""
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    for seen, expected in zip(
        first_tokens(smollm2, prompts), first_tokens(smollm2_on_cpu, prompts), strict=True
    ):
        for one, other in ((seen, expected), (expected, seen)):
            best = max(one, key=one.__getitem__)
            assert best in other
            assert max(other.values()) - other[best] < QUANTISED
        both = seen.keys() & expected.keys()
        assert len(both) > 10
        assert max(abs(seen[token] - expected[token]) for token in both) < QUANTISED


def test_smollm2_answers_as_on_the_processor(
    smollm2: Engine, smollm2_on_cpu: Engine, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    drawn = answers(smollm2, prompts)
    assert_agrees(drawn, smollm2_on_cpu, prompts, QUANTISED)
    assert tokenizer.decode([drawn[0][0][0]]) == " Paris"


def test_smollm2_embeds_as_on_the_processor(tokenizer: Tokenizer) -> None:
    inputs = [tokenizer.encode(text).ids for text in TEXTS]
    vectors = []
    for device in (DEVICE, "cpu"):
        engine = make(smollm2_gguf(), device, embeddings=1)
        vectors.append(np.array(engine.embed(inputs)))
        engine.close()
    assert ((vectors[0] * vectors[1]).sum(1) > 0.98).all()
    assert (vectors[0] @ vectors[1].T).argmax(1).tolist() == list(range(len(inputs)))


@pytest.mark.skipif(ON_CPU, reason="there is no device whose memory could be asked for")
def test_weights_of_smollm2_lie_on_the_device_and_leave_it() -> None:
    from shards.engines.llama_devices import accelerators

    def free() -> int:
        return sum(device.memory_free() for device in accelerators())

    make(smollm2_gguf()).close()  # what the libraries themselves take, they keep
    before = free()
    engine = make(smollm2_gguf())
    taken = before - free()
    engine.close()
    assert taken > 0.9 * engine.describe().weight_bytes
    assert before - free() < 0.5 * taken
