"""vLLM's own sampler (``sampler=vllm``): the whole contract, and that it draws as the host does."""

from collections.abc import Iterator

import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import Engine, EngineOptions
from shards.engines.vllm_engine import VllmEngine
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import tiny_llama_folder

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def loaded() -> Iterator[VllmEngine]:
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=320,
        threads=1,
        dtype="float32",
        extra=(("eager", "1"), ("sampler", "vllm")),
    )
    engine = load("vllm", options, lambda _fraction: None)
    assert isinstance(engine, VllmEngine)
    yield engine
    engine.close()


@pytest.fixture
def engine(loaded: VllmEngine) -> VllmEngine:
    loaded.reset()
    return loaded


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = np.random.default_rng(7).integers
    return [draw(0, 256, 40 + 9 * n).tolist() for n in range(5)]


class TestContract(GrammarContract, PromptContract, EngineContract):
    late = True

    @pytest.fixture
    def engine(self, loaded: VllmEngine) -> Engine:
        loaded.reset()
        return loaded
