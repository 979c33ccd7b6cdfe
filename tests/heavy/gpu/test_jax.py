"""The JAX engine on a GPU: the contract, no compilation while serving, and parity.

``make test-gpu`` needs a GPU, and these tests fail without one. To rehearse them,
``ROUNDHOUSE_GPU_TESTS_ON=cpu`` names another device: the programs are those of a GPU all the same.
``ROUNDHOUSE_TEST_SMOLLM2`` may name a folder with what ``models.smollm2_folder`` makes.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import EngineOptions, Plan, SamplingParams
from shards.engines.jax_engine import JaxEngine
from tests.engines.contract import EngineContract, admit, decode
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy import reference
from tests.heavy.family import MEMBERS, member_folder
from tests.heavy.jax.test_contract import compiled_by, prompts_of, serve_all_shapes
from tests.heavy.jax.test_smollm2 import TOGETHER, agreed, answer
from tests.heavy.models import smollm2_folder, tiny_llama_folder

DEVICE = os.environ.get("ROUNDHOUSE_GPU_TESTS_ON", "gpu")
# Those of a GPU, whatever the device.
EXTRA = (("program", "step"), ("argmax", "device"), ("sample", "device"))
# What bfloat16 may change of a logprob, in nats, and what margin of two logits it may overturn.
ROUNDED = 0.15
ROUNDED_MARGIN = 0.5


def make(model: Path, **changes: Any) -> JaxEngine:
    given = {
        "model": model,
        "model_id": "model",
        "kv_tokens": 1024,
        "sequences_max": TOGETHER,
        "step_tokens_max": 128,
        "device": DEVICE,
        "dtype": "float32",
        "extra": EXTRA,
        **changes,
    }
    engine = load("jax", EngineOptions(**given), lambda _fraction: None)
    assert isinstance(engine, JaxEngine)
    assert engine.describe().device.startswith(DEVICE.partition(":")[0])
    return engine


def smollm2() -> Path:
    given = os.environ.get("ROUNDHOUSE_TEST_SMOLLM2")
    return Path(given) if given else smollm2_folder()


@pytest.fixture(scope="module")
def made() -> Iterator[JaxEngine]:
    # The suite also shares prefixes of eight tokens.
    engine = make(tiny_llama_folder(), sequences_max=12, extra=(*EXTRA, ("page_tokens", "8")))
    yield engine
    engine.close()


@pytest.fixture
def engine(made: JaxEngine) -> JaxEngine:
    made.reset()
    return made


@pytest.fixture
def prompts(engine: JaxEngine) -> list[list[int]]:
    return prompts_of(engine)


class TestContract(GrammarContract, PromptContract, EngineContract):
    """See there."""


def test_serving_compiles_nothing(engine: JaxEngine) -> None:
    assert compiled_by(lambda: serve_all_shapes(engine)) == []


@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_member_of_the_family_answers_as_on_a_cpu(tmp_path: Path, name: str) -> None:
    """In float32; products in fewer bits, a GPU's own choice, would miss by more than rounding."""
    entry = next(entry for entry in reference.read("family") if entry["name"] == name)
    folder = member_folder(name, tmp_path / name)
    engine = make(folder, kv_tokens=256, sequences_max=1, step_tokens_max=32)
    try:
        asked = admit(1, entry["prompt"], SamplingParams(logprobs=True))
        engine.step(Plan(admits=[asked], work=[(1, 29)]))
        first = engine.step(Plan(work=[(1, len(entry["prompt"]) - 29)]))
        found = first.tokens + decode(engine, 1, len(entry["tokens"]) - 1)
    finally:
        engine.close()
    assert first.logprobs[1].logprob == pytest.approx(entry["logprob"], abs=1e-3)
    assert agreed(found, entry) > len(found) // 2


def test_smollm2_in_float32_answers_as_on_a_cpu() -> None:
    """32 prompts of 64 tokens, eight at a time, each token unless two are nearly equal."""
    entries = reference.read()
    engine = make(smollm2())
    total = 0
    try:
        for start in range(0, len(entries), TOGETHER):
            part = entries[start : start + TOGETHER]
            found, logprobs = answer(engine, [entry["prompt"] for entry in part], reference.COUNT)
            expected = [entry["logprob"] for entry in part]
            np.testing.assert_allclose(logprobs, expected, atol=1e-3)
            total += sum(map(agreed, found, part))
    finally:
        engine.close()
    assert total > 0.95 * len(entries) * reference.COUNT


def test_smollm2_in_bfloat16_answers_the_clear_ones() -> None:
    entries = reference.read()[:TOGETHER]
    engine = make(smollm2(), dtype="bfloat16")
    try:
        found, logprobs = answer(engine, [entry["prompt"] for entry in entries], 16)
    finally:
        engine.close()
    expected = [entry["logprob"] for entry in entries]
    np.testing.assert_allclose(logprobs, expected, atol=ROUNDED)
    compared = [
        agreed(tokens, entry, ROUNDED_MARGIN) for tokens, entry in zip(found, entries, strict=True)
    ]
    assert sum(compared) > len(entries)
