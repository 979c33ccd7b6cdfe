"""The Neuron adapter's slots and buckets, on real XLA graphs on the CPU: the whole contract.

Run with PJRT_DEVICE=CPU where torch-xla is installed (``make test-neuron``).
"""

from pathlib import Path

import numpy as np
import pytest
from torch_xla.debug import metrics

from shards.engines.base import Engine, EngineOptions, Plan
from shards.engines.neuron import NeuronEngine
from shards.engines.neuron_graphs import NxdiGraphs, OptimumGraphs
from shards.engines.self_model import open_folder
from tests.engines.contract import EngineContract, admit, generate
from tests.heavy.models import TINY_VOCAB, tiny_llama_folder
from tests.heavy.neuron.xla_model import NxdiModel, OptimumModel

SLOTS = 12
LENGTH = 129
CONTEXT = [16, 32, 128]
GENERATION = [32, 129]
KINDS = ("optimum", "nxdi")


def tiny() -> Path:
    return tiny_llama_folder(heads=2, kv_heads=1, layers=1)


def options(folder: Path, **given: int) -> EngineOptions:
    return EngineOptions(folder, "tiny", **{"kv_tokens": 384, "step_tokens_max": 100, **given})


def make(kind: str, slots: int = SLOTS) -> tuple[NeuronEngine, OptimumModel | NxdiModel]:
    folder = tiny()
    if kind == "optimum":
        model = OptimumModel(folder, slots=slots, length=LENGTH, context=CONTEXT[-1])
        graphs = OptimumGraphs(model, TINY_VOCAB)
    else:
        model = NxdiModel(
            folder, slots=slots, length=LENGTH, context=CONTEXT, generation=GENERATION
        )
        graphs = NxdiGraphs(model, TINY_VOCAB)
    given = options(folder)
    return NeuronEngine(given, open_folder("neuron", given), graphs, kind), model


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest) -> tuple[NeuronEngine, OptimumModel | NxdiModel]:
    return make(request.param)


@pytest.fixture
def engine(made: tuple[NeuronEngine, OptimumModel | NxdiModel]) -> Engine:
    made[0].reset()
    made[1].calls.clear()
    return made[0]


@pytest.fixture
def prompts() -> list[list[int]]:
    words = "All work and no play makes Jack a dull boy; the early bird catches the worm."
    # Together within one step.
    return [list(words[n : n + 20 + 2 * n].encode()) for n in range(4)]


class TestContract(EngineContract):
    pass


def compilations() -> int:
    found = metrics.metric_data("CompileTime")
    return found[0] if found else 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_one_graph_for_each_bucket_and_none_while_serving(kind: str) -> None:
    # XLA keeps what it has compiled, for any model: no other test has this many slots.
    engine, _ = make(kind, slots=7 + KINDS.index(kind))
    before = compilations()
    _touch_every_bucket(engine)
    buckets = 2 if kind == "optimum" else len(CONTEXT) + len(GENERATION)
    assert compilations() - before == buckets
    # Other lengths, other slots, other company: the same graphs.
    engine.reset()
    for sequence in range(1, 6):
        engine.step(Plan(admits=[admit(sequence, [sequence])], work=[(sequence, 1)]))
    engine.step(Plan(drops=[2, 4]))
    for length in (2, 5, 15, 16, 17, 30, 31, 32, 33, 97, 98):
        tokens = [n % 250 for n in range(length)]
        plan = Plan(admits=[admit(99, tokens)], work=[(99, length), (1, 1), (5, 1)])
        engine.step(plan)
        engine.step(Plan(work=[(3, 1)]))
        engine.step(Plan(drops=[99]))
    assert compilations() - before == buckets


def _touch_every_bucket(engine: Engine) -> None:
    for sequence, length in enumerate((10, 20, 90), start=1):
        generate(engine, sequence, list(range(length)), 2)
        engine.step(Plan(drops=[sequence]))


def test_a_step_is_one_call_per_bucket_and_one_for_all_decodes(
    made: tuple[NeuronEngine, OptimumModel | NxdiModel], engine: Engine
) -> None:
    model = made[1]
    for sequence in (1, 2, 3):
        engine.step(Plan(admits=[admit(sequence, [7] * 10)], work=[(sequence, 10)]))
    model.calls.clear()
    lengths = {4: 10, 5: 15, 6: 20, 7: 40}
    admits = [admit(sequence, [sequence] * length) for sequence, length in lengths.items()]
    outcome = engine.step(Plan(admits=admits, work=[(1, 1), (2, 1), (3, 1), *lengths.items()]))
    assert outcome.sequences == [1, 2, 3, 4, 5, 6, 7]
    if isinstance(model, OptimumModel):
        assert model.calls == ["context", "generation"]
    else:
        contexts = [("context", 16), ("context", 32), ("context", 128)]
        # The longest sequence's own next place, 40, is written to in passing.
        assert model.calls == [*contexts, ("generation", 129)]


def test_a_slot_that_sits_a_step_out_is_not_damaged(
    engine: Engine, prompts: list[list[int]]
) -> None:
    expected = [generate(engine, n, prompt, 8) for n, prompt in enumerate(prompts[:2], start=1)]
    engine.reset()
    drawn = {n: generate(engine, n, prompts[n - 1], 2) for n in (1, 2)}
    for turn in range(12):
        # They take turns, at different positions, and others come and go beside them.
        n = 1 + turn % 2
        drawn[n] += engine.step(Plan(work=[(n, 1)])).tokens
        engine.step(Plan(admits=[admit(9, [turn + 1, 5])], work=[(9, 2)]))
        engine.step(Plan(drops=[9]))
    assert [drawn[1], drawn[2]] == expected


def test_a_sequence_longer_than_the_context_graph_goes_on_after_a_loss(
    prompts: list[list[int]],
) -> None:
    folder = tiny()
    model = OptimumModel(folder, slots=2, length=128, context=40)
    given = options(folder, kv_tokens=0)
    short = NeuronEngine(
        given, open_folder("neuron", given), OptimumGraphs(model, TINY_VOCAB), "optimum"
    )
    unbroken = generate(short, 1, prompts[2], 40)
    short.reset()
    model.calls.clear()
    known = [*prompts[2], *unbroken[:30]]
    assert generate(short, 2, known, 1, prompt_len=len(prompts[2])) == unbroken[30:31]
    assert model.calls == ["context", *["generation"] * (len(known) - 40)]


def test_both_faces_draw_the_same(prompts: list[list[int]]) -> None:
    drawn = []
    for kind in KINDS:
        engine, _ = make(kind)
        drawn.append([generate(engine, n, prompt, 12) for n, prompt in enumerate(prompts, 1)])
    assert drawn[0] == drawn[1]
    assert len(np.unique(np.array(drawn[0]))) > 4
