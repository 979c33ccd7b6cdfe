"""Log probabilities of prompts, which vLLM can tell where it has no adapters."""

from collections.abc import Iterator

import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import Engine, EngineOptions
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import tiny_llama_folder

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def loaded() -> Iterator[Engine]:
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=1024,
        sequences_max=12,
        step_tokens_max=256,
        threads=1,
        dtype="float32",
        extra=(("eager", "1"),),
    )
    engine = load("vllm", options, lambda _fraction: None)
    yield engine
    engine.close()


class TestPrompts(PromptContract):
    late = True

    @pytest.fixture
    def engine(self, loaded: Engine) -> Engine:
        loaded.reset()
        assert "prompt_logprobs" in loaded.describe().features
        return loaded

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        draw = np.random.default_rng(7).integers
        return [draw(0, 256, 40 + 9 * n).tolist() for n in range(5)]
