"""Tokens that the next step takes from the device: the contract, with steps under way.

A CPU may be done at once. Here draws pass for under way until somebody asks for them.
"""

from collections.abc import Iterator

import pytest

from shards.engines.base import Engine
from shards.engines.jax_engine import JaxEngine
from shards.engines.jax_sampling import Pending
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_late import LateContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.jax.test_contract import compiled_by, make, prompts_of, serve_all_shapes

DEVICE = (("argmax", "device"), ("sample", "device"))


@pytest.fixture(scope="module", params=["layer", "step"])
def made(request: pytest.FixtureRequest) -> Iterator[JaxEngine]:
    engine = make(extra=(("program", request.param), *DEVICE))
    yield engine
    engine.close()


@pytest.fixture
def engine(made: JaxEngine, monkeypatch: pytest.MonkeyPatch) -> JaxEngine:
    monkeypatch.setattr(Pending, "done", property(lambda _pending: False))
    made.reset()
    return made


@pytest.fixture
def prompts(engine: JaxEngine) -> list[list[int]]:
    return prompts_of(engine)


class TestContract(LateContract, GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, engine: JaxEngine) -> Engine:
        return engine


def test_steps_that_overlap_compile_nothing(engine: JaxEngine) -> None:
    assert compiled_by(lambda: serve_all_shapes(engine)) == []
