"""llama.cpp on an accelerator: the contract, and the same answers as on the processor.

Fails where llama.cpp finds no accelerator. ROUNDHOUSE_GPU_TESTS_ON=cpu runs the same on the
processor, which shows that the tests themselves work. ROUNDHOUSE_TEST_GGUF names a file of the test
model, SmolLM2-135M-Instruct in Q4_1, where its package is not installed.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shards.engines import load
from shards.engines.base import Engine, EngineOptions, Plan, SamplingParams
from shards.engines.llama_devices import accelerators
from tests.engines.contract import EngineContract, admit
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.engines.test_llamacpp import TEXTS, model_file

ON_CPU = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON") == "cpu"
DEVICE = "cpu" if ON_CPU else "gpu"
NEW_TOKENS = 32
# Two devices may choose differently where the best two tokens are this near, in nats. Rounding of
# quantised activations moves logits by up to 1.1 on processors already; see test_llamacpp.py.
NEAR_TIE = 1.0


def gguf() -> Path:
    named = os.environ.get("ROUNDHOUSE_TEST_GGUF")
    return Path(named) if named else model_file()


def make(device: str, **extra: object) -> Engine:
    options = EngineOptions(
        gguf(),
        "smollm2",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=256,
        device=device,
        extra=tuple((key, str(value)) for key, value in extra.items()),
    )
    return load("llamacpp", options, lambda _fraction: None)


@pytest.fixture(scope="module")
def made() -> Iterator[Engine]:
    engine = make(DEVICE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(made: Engine) -> Tokenizer:
    return Tokenizer.from_str(made.tokenizer_files()["tokenizer.json"].decode())


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, made: Engine) -> Engine:
        made.reset()
        return made

    @pytest.fixture
    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [(tokenizer.encode(text).ids * 2)[: 24 + 3 * n] for n, text in enumerate(TEXTS)]


def test_names_what_it_computes_on(made: Engine) -> None:
    told = made.describe().device
    assert told == "cpu" if ON_CPU else re.match(r"[a-z]+(:\d+)? \w+", told)


@pytest.mark.skipif(ON_CPU, reason="there is no device whose memory could be asked for")
def test_weights_lie_on_the_device_and_leave_it() -> None:
    def free() -> int:
        return sum(device.memory_free() for device in accelerators())

    make(DEVICE).close()  # what the libraries themselves take, they keep
    before = free()
    engine = make(DEVICE)
    taken = before - free()
    engine.close()
    assert taken > 0.9 * engine.describe().weight_bytes
    assert before - free() < 0.5 * taken


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Of each prompt the tokens of a greedy answer, and by how much each beat the next best."""
    engine.reset()
    sampling = SamplingParams(logprobs=True, top_logprobs=2)
    numbers = range(len(prompts))
    answers: list[list[tuple[int, float]]] = [[] for _ in numbers]
    plan = Plan(
        admits=[admit(n, prompts[n], sampling) for n in numbers],
        work=[(n, len(prompts[n])) for n in numbers],
    )
    for _ in range(NEW_TOKENS):
        outcome = engine.step(plan)
        for n, token in zip(outcome.sequences, outcome.tokens, strict=True):
            best, second = outcome.logprobs[n].top_values[:2]
            answers[n].append((token, best - second))
        plan = Plan(work=[(n, 1) for n in numbers])
    return answers


def test_greedy_answers_are_those_of_the_processor(made: Engine, tokenizer: Tokenizer) -> None:
    encoded = [tokenizer.encode(text).ids for text in TEXTS]
    prompts = encoded + [ids[: len(ids) // 2] for ids in encoded]
    seen = greedy(made, prompts)
    other = make("cpu")
    expected = greedy(other, prompts)
    other.close()
    agreeing = 0
    for ours, theirs in zip(seen, expected, strict=True):
        same = [one[0] == two[0] for one, two in zip(ours, theirs, strict=True)]
        parted = same.index(False) if False in same else NEW_TOKENS
        agreeing += parted
        if parted < NEW_TOKENS:
            assert min(ours[parted][1], theirs[parted][1]) < NEAR_TIE
    assert agreeing > len(prompts) * NEW_TOKENS // 2


def test_embeddings_are_those_of_the_processor(tokenizer: Tokenizer) -> None:
    inputs = [tokenizer.encode(text).ids for text in TEXTS]
    vectors = []
    for device in (DEVICE, "cpu"):
        engine = make(device, embeddings=1)
        vectors.append(np.array(engine.embed(inputs)))
        engine.close()
    assert ((vectors[0] * vectors[1]).sum(1) > 0.98).all()
    assert (vectors[0] @ vectors[1].T).argmax(1).tolist() == list(range(len(inputs)))
