"""Tokens that the next step takes from the device: the contract, with steps under way.

A CPU's results are there at once. Here they pass for under way until somebody asks for them, as an
accelerator's do, so that the next step is started without them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shards.engines.base import Engine, Plan
from shards.engines.torch_engine import TorchEngine
from shards.engines.torch_graphs import DecodeGraphs, Packing, run_directly
from shards.engines.torch_late import Fetch, Greedy
from shards.sampling import NOT_FINITE
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_late import LateContract
from tests.engines.contract_prompts import PromptContract
from tests.engines.driving import admit
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import make

PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]


def captured(engine: TorchEngine) -> TorchEngine:
    """An engine whose decode steps are packed as for a captured graph."""
    packing = Packing(engine._model.kinds, 16, torch.float32, engine._late, masked=True)
    engine._graphs = DecodeGraphs(engine._model, packing, 8, 64, run_directly)
    return engine


@pytest.fixture(scope="module", params=["plainly", "captured"])
def made(request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    engine = make(tiny_llama_folder(), extra={"sample": "device"})
    yield captured(engine) if request.param == "captured" else engine
    engine.close()


@pytest.fixture
def engine(made: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    monkeypatch.setattr(Fetch, "done", property(lambda _fetch: False))
    made.reset()
    return made


class TestContract(LateContract, GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, engine: TorchEngine) -> Engine:
        return engine

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS


def test_a_row_that_fails_under_way_tells_it_once(engine: TorchEngine) -> None:
    prompt, other = PROMPTS[:2]
    admits = [admit(1, prompt), admit(2, other)]
    head = engine._model._model.lm_head
    spoil = head.register_forward_hook(lambda _m, _i, out: spoiled(out))
    try:
        first = engine.start(Plan(admits=admits, work=[(1, len(prompt)), (2, len(other))]))
    finally:
        spoil.remove()
    second = engine.start(Plan(work=[(1, 1), (2, 1)]))
    outcome = first.finish()
    assert outcome.failures == {1: NOT_FINITE}
    assert outcome.sequences == [2]
    outcome = second.finish()
    assert (outcome.failures, outcome.sequences) == ({}, [2])
    assert engine.step(Plan(work=[(1, 1), (2, 1)])).sequences == [2]
    assert engine.step(Plan(drops=[1], work=[(2, 1)])).sequences == [2]


def spoiled(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 0, :] = torch.nan
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_likeliest_are_drawn_and_what_is_no_number_fails(
    bad: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [bad, bad, bad], [5.0, 1.0, 2.0]], dtype=dtype)
    drawing: Any = Greedy(logits)
    assert drawing.tokens.tolist() == [1, 0, 0]
    drawn = drawing.take()
    assert drawn.tokens[::2] == [1, 0]
    assert drawn.failures == {1: NOT_FINITE}
