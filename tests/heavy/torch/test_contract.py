"""The contract of all engines, kept by the torch engine with a tiny random Llama in float32."""

from collections.abc import Iterator

import pytest

from shards.engines.base import Engine
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import make


@pytest.fixture(scope="module")
def made() -> Iterator[Engine]:
    engine = make(tiny_llama_folder())
    yield engine
    engine.close()


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, made: Engine) -> Engine:
        made.reset()
        return made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]
