"""Tokens that the next step takes from the device: the contract, with steps under way.

A CPU may be done at once. Here draws pass for under way until somebody asks for them.
"""

from collections.abc import Iterator

import pytest

from shards.engines.base import Engine, Plan, SamplingParams
from shards.engines.caller import late
from shards.engines.jax_engine import JaxEngine
from shards.engines.jax_sampling import Pending
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.engines.driving import admit
from tests.heavy.jax.test_contract import compiled_by, make, prompts_of, serve_all_shapes

DEVICE = (("argmax", "device"), ("sample", "device"))
WARM = SamplingParams(temperature=0.9, seed=3)
PENAL = SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.2)


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


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, engine: JaxEngine) -> Engine:
        return engine


def known(engine: JaxEngine, sequence: int) -> list[int]:
    return engine._residents.by_sequence[sequence].tokens


@pytest.mark.parametrize("sampling", [SamplingParams(), WARM], ids=["greedy", "warm"])
def test_a_step_starts_without_the_tokens_of_the_one_before(
    engine: JaxEngine, prompts: list[list[int]], sampling: SamplingParams
) -> None:
    prompt, other = prompts[:2]
    first = engine.start(Plan(admits=[admit(1, prompt, sampling)], work=[(1, len(prompt))]))
    plan = Plan(admits=[admit(2, other, sampling)], work=[(2, len(other)), (1, 1)])
    second = engine.start(plan)
    assert known(engine, 1)[len(prompt) :] == [late(0), late(1)]
    tokens = first.finish().tokens
    assert known(engine, 1)[len(prompt) :] == [*tokens, late(1)]
    assert second.finish().tokens == [known(engine, 2)[-1], known(engine, 1)[-1]]
    assert min(known(engine, 1) + known(engine, 2)) >= 0


def test_a_row_for_the_host_waits_for_what_is_under_way(
    engine: JaxEngine, prompts: list[list[int]]
) -> None:
    prompt, other = prompts[:2]
    first = engine.start(Plan(admits=[admit(1, prompt)], work=[(1, len(prompt))]))
    plan = Plan(admits=[admit(2, other, PENAL)], work=[(2, len(other)), (1, 1)])
    second = engine.start(plan)
    assert known(engine, 1)[len(prompt)] >= 0
    assert second.done
    assert first.finish().sequences == [1]
    assert second.finish().sequences == [2, 1]


def test_steps_that_overlap_compile_nothing(engine: JaxEngine) -> None:
    assert compiled_by(lambda: serve_all_shapes(engine)) == []
