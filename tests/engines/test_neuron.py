"""Neuron's adapter: slots, buckets and both libraries' faces, against fakes of the recorded ones.

The same adapter runs on real XLA graphs in ``tests/heavy/neuron``. What cannot be checked without a
device is said in ``docs/engines/neuron.md``.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.engines import ENGINES
from shards.engines import load as load_engine
from shards.engines.base import (
    Engine,
    EngineOptions,
    ModelError,
    Plan,
    SamplingParams,
    Scheduling,
    Watermark,
)
from shards.engines.neuron import NeuronEngine
from shards.engines.neuron_graphs import Buckets, Graphs, NxdiGraphs, OptimumGraphs
from shards.engines.self_model import open_folder
from tests.engines.contract import EngineContract, admit, decode, generate
from tests.engines.contract_grammar import GrammarContract
from tests.engines.signatures.fake_neuron import NxdiModel, OptimumModel, Tensor, torch_module
from tests.engines.signatures.strict import installed
from tests.engines.signatures.toy import VOCAB
from tests.heavy.models import tiny_llama_folder

KINDS = ("optimum", "nxdi")
SLOTS = 12
Made = tuple[NeuronEngine, OptimumModel | NxdiModel]


@pytest.fixture(autouse=True)
def torch() -> Iterator[None]:
    with installed(torch=torch_module()):
        yield


def make(kind: str, kv_tokens: int = 256, step_tokens_max: int = 100, **given: Any) -> Made:
    options = EngineOptions(
        tiny_llama_folder(), "tiny", kv_tokens=kv_tokens, step_tokens_max=step_tokens_max
    )
    folder = open_folder("neuron", options)
    if kind == "optimum":
        model: Any = OptimumModel(SLOTS, **given)
        graphs: Graphs = OptimumGraphs(model, VOCAB)
    else:
        model = NxdiModel(SLOTS, **given)
        graphs = NxdiGraphs(model, VOCAB)
    return NeuronEngine(options, folder, graphs, kind), model


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    return make(request.param)


@pytest.fixture
def engine(made: Made) -> Engine:
    return made[0]


@pytest.fixture
def prompts() -> list[list[int]]:
    return [list(range(10 * n, 10 * n + 22 + n)) for n in range(1, 5)]


class TestContract(GrammarContract, EngineContract):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_keyword_that_the_model_does_not_have_is_noticed(kind: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        make(kind)[1].forward(no_such_argument=1)


# Slots and buckets --------------------------------------------------------------------------------


def test_an_input_meets_the_smallest_graph_that_holds_it() -> None:
    loose = Buckets((32, 64, 128), strict=False)
    assert [loose.width(length) for length in (1, 32, 33, 64, 128)] == [32, 32, 64, 64, 128]
    strict = Buckets((32, 64, 128), strict=True)
    assert strict.widths == (31, 63, 128)
    assert [strict.width(length) for length in (31, 32, 63, 64, 128)] == [31, 63, 63, 128, 128]


def test_a_step_is_one_call_per_bucket_and_one_for_all_decodes() -> None:
    engine, model = make("nxdi", kv_tokens=0, step_tokens_max=500)
    for sequence in (1, 2):
        engine.step(Plan(admits=[admit(sequence, [7] * 10)], work=[(sequence, 10)]))
    model.calls.clear()
    lengths = {4: 20, 5: 31, 6: 32, 7: 100, 8: 1}
    admits = [admit(sequence, [sequence] * length) for sequence, length in lengths.items()]
    outcome = engine.step(Plan(admits=admits, work=[(1, 1), (2, 1), *lengths.items()]))
    assert outcome.sequences == [1, 2, 4, 5, 6, 7, 8]
    contexts = [("context", 32), ("context", 64), ("context", 128)]
    assert model.calls == [*contexts, ("generation", 128)]
    model.calls.clear()
    engine.step(Plan(drops=[7]))
    engine.step(Plan(work=[(1, 1), (8, 1)]))
    assert model.calls == [("generation", 64)]


def test_empty_slots_beside_a_decode_are_not_taken_for_prompts() -> None:
    engine, model = make("nxdi")
    assert isinstance(model, NxdiModel)
    prompt = [3, 1, 4, 1, 5]
    expected = generate(engine, 1, prompt, 4)
    # All but one of the slots are empty, and are written to at position 0.
    assert model.calls == [("context", 32), *[("generation", 64)] * 3]
    # The library's forward would compute prompts there, over what the slots hold.
    ids = Tensor(np.zeros((SLOTS, 1), np.int32))
    given = {"input_ids": ids, "attention_mask": ids, "position_ids": ids}
    with pytest.raises(AssertionError, match="which of equal ones"):
        model.forward(**given, seq_ids=Tensor(np.arange(SLOTS)))
    assert model.calls[-1] == ("context", 32)
    engine.reset()
    assert generate(engine, 2, prompt, 4) == expected


@pytest.mark.parametrize(("kind", "shortest"), [("optimum", 2), ("nxdi", 3)])
def test_a_prompt_whose_end_could_be_in_the_padding_is_generated(kind: str, shortest: int) -> None:
    for length in range(1, 5):
        engine, model = make(kind)
        generate(engine, 1, [7] * length, 1)
        kinds = {called for called, _ in model.calls}
        assert kinds == ({"context"} if length >= shortest else {"generation"})


def test_a_slot_that_sits_a_step_out_is_not_damaged(
    engine: Engine, prompts: list[list[int]]
) -> None:
    expected = [generate(engine, n, prompts[n - 1], 8) for n in (1, 2)]
    engine.reset()
    drawn = {n: generate(engine, n, prompts[n - 1], 2) for n in (1, 2)}
    for turn in range(12):
        n = 1 + turn % 2
        drawn[n] += engine.step(Plan(work=[(n, 1)])).tokens
        engine.step(Plan(admits=[admit(9, [turn + 1, 5])], work=[(9, 2)]))
        engine.step(Plan(drops=[9]))
    assert [drawn[1], drawn[2]] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_length_up_to_the_last_place_is_computed(kind: str) -> None:
    engine, _ = make(kind, kv_tokens=0, step_tokens_max=200)
    limit = engine.describe().length_max
    assert limit == 127
    tokens = [n % 250 for n in range(limit)]
    for length in (1, 2, 3, 30, 31, 32, 33, 62, 63, 64, 65, 126, limit):
        count = min(3, limit + 1 - length)
        drawn = generate(engine, length, tokens[:length], count)
        engine.step(Plan(drops=[length]))
        # The same tokens one after the other, from a single one on.
        forced = [*tokens[:length], *drawn[:-1]]
        assert generate(engine, 900, forced, 1) == drawn[-1:]
        engine.step(Plan(drops=[900]))


def test_a_sequence_longer_than_the_context_graph_goes_on_after_a_loss(
    prompts: list[list[int]],
) -> None:
    engine, model = make("optimum", context=40)
    unbroken = generate(engine, 1, prompts[2], 40)
    engine.reset()
    model.calls.clear()
    known = [*prompts[2], *unbroken[:30]]
    assert generate(engine, 2, known, 1, prompt_len=len(prompts[2])) == unbroken[30:31]
    assert [kind for kind, _ in model.calls] == ["context", *["generation"] * (len(known) - 40)]


def test_chunks_are_bookkeeping(made: Made, prompts: list[list[int]]) -> None:
    engine, model = made
    whole = generate(engine, 1, prompts[3], 3)
    engine.reset()
    model.calls.clear()
    engine.step(Plan(admits=[admit(2, prompts[3])], work=[(2, 10)]))
    engine.step(Plan(work=[(2, 10)]))
    assert model.calls == []
    first = engine.step(Plan(work=[(2, len(prompts[3]) - 20)]))
    assert [kind for kind, _ in model.calls] == ["context"]
    assert first.tokens + decode(engine, 2, 2) == whole


def test_describes_what_is_true() -> None:
    engine, _ = make("nxdi", kv_tokens=0)
    info = engine.describe()
    assert info.scheduling is Scheduling.CALLER
    assert (info.sequences_max, info.length_max, info.kv_tokens) == (SLOTS, 127, SLOTS * 127)
    assert (info.dtype, info.device) == ("float32", "neuron")
    assert "prefix_sharing" not in info.features
    assert set(info.features) == set(ENGINES["neuron"].features)


def test_a_model_that_draws_on_the_device_says_what_it_cannot(prompts: list[list[int]]) -> None:
    host, _ = make("optimum")
    engine, model = make("optimum", on_device_sampling=True)
    info = engine.describe()
    assert info.features == ()
    assert "among the 64 likeliest tokens" in info.warnings[0]
    # Greedy is the same wherever it is drawn.
    for n, prompt in enumerate(prompts, start=1):
        assert generate(engine, n, prompt, 6) == generate(host, n, prompt, 6)
    model.sampled.clear()
    warm = SamplingParams(temperature=0.5, top_k=9, top_p=0.75)
    free = SamplingParams(temperature=2.0)
    plan = Plan(
        admits=[admit(8, [1, 2], warm), admit(9, [1, 2], free)], work=[(1, 1), (8, 2), (9, 2)]
    )
    engine.step(plan)
    prompt_words, decode_words = model.sampled
    assert prompt_words.tolist() == [[9, 0.75, 0.5], [64, 1.0, 2.0]]
    assert decode_words.tolist() == [[1, 1, 1]] * SLOTS
    slots = {one.sequence: one.slot for one in engine._residents.by_sequence.values()}
    engine.step(Plan(work=[(8, 1), (1, 1), (9, 1)]))
    words = model.sampled[-1]
    assert words[slots[8]].tolist() == [9, 0.75, 0.5]
    assert words[slots[1]].tolist() == [1, 1, 1]


def test_what_the_device_would_ignore_fails_that_sequence_alone() -> None:
    engine, _ = make("optimum", on_device_sampling=True)
    cases = {
        1: SamplingParams(temperature=1.0, min_p=0.1),
        2: SamplingParams(temperature=1.0, top_k=65),
        4: SamplingParams(watermark=Watermark(0.5, 2.0, 1)),
    }
    admits = [admit(n, [n, 5], sampling) for n, sampling in cases.items()]
    plan = Plan(admits=[*admits, admit(3, [3, 5])], work=[(1, 2), (2, 2), (3, 2), (4, 2)])
    outcome = engine.step(plan)
    assert outcome.sequences == [3]
    assert "does not support min_p" in outcome.failures[1]
    assert "draws among 64 tokens in this model: top_k is 65" in outcome.failures[2]
    assert "does not support watermarks" in outcome.failures[4]
    assert engine.step(Plan(work=[(1, 1), (2, 1), (3, 1)])).sequences == [3]


@pytest.mark.parametrize(
    ("asked", "feature"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"repetition_penalty": 1.1}, "penalties"),
        ({"logit_bias": ((1, 1.0),)}, "logit_bias"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"typical_p": 0.5, "temperature": 1.0}, "typical_p"),
    ],
)
def test_what_needs_logits_fails_by_name_where_the_device_draws(
    asked: dict[str, Any], feature: str
) -> None:
    engine, _ = make("optimum", on_device_sampling=True)
    plan = Plan(admits=[admit(1, [1, 5], SamplingParams(**asked))], work=[(1, 2)])
    told = f"neuron does not support {feature} in a model that draws on the device"
    assert engine.step(plan).failures == {1: told}


# Loading ------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    folder = tmp_path / "compiled"
    shutil.copytree(tiny_llama_folder(), folder)
    (folder / "neuron_config.json").write_text(json.dumps({}))
    return folder


def load(folder: Path, **given: Any) -> Engine:
    return load_engine("neuron", EngineOptions(folder, "tiny", **given), lambda _fraction: None)


def package(name: str, **offers: Any) -> ModuleType:
    made = ModuleType(name)
    for key, value in offers.items():
        setattr(made, key, value)
    return made


def test_loads_what_optimum_compiled(compiled: Path) -> None:
    asked: list[str] = []

    def from_pretrained(path: str) -> OptimumModel:
        asked.append(path)
        return OptimumModel()

    library = package(
        "optimum.neuron", NeuronModelForCausalLM=SimpleNamespace(from_pretrained=from_pretrained)
    )
    with installed(optimum=ModuleType("optimum"), optimum__neuron=library):
        engine = load(compiled)
    assert asked == [str(compiled)]
    assert len(generate(engine, 1, [1, 2, 3], 3)) == 3


def test_loads_what_nxd_inference_compiled(compiled: Path) -> None:
    paths: list[str] = []

    class Llama(NxdiModel):
        def __init__(self, model_path: str) -> None:
            super().__init__()
            paths.append(model_path)

        def load(self, compiled_model_path: str) -> None:
            paths.append(compiled_model_path)

    name = "neuronx_distributed_inference"
    library = package(f"{name}.utils.constants", MODEL_TYPES={"llama": {"causal-lm": Llama}})
    modules = {
        name: ModuleType(name),
        f"{name}__utils": ModuleType(f"{name}.utils"),
        f"{name}__utils__constants": library,
    }
    with installed(**modules):
        engine = load(compiled, extra=(("library", "nxdi"),))
        assert paths == [str(compiled)] * 2
        assert len(generate(engine, 1, [1, 2, 3], 3)) == 3
        library.MODEL_TYPES = {"dbrx": {}}  # type: ignore[attr-defined]
        with pytest.raises(ModelError, match="has no causal language model llama"):
            load(compiled, extra=(("library", "nxdi"),))


def test_a_missing_package_is_one_clear_line(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.neuron", None)
    with pytest.raises(ModelError, match=r"needs the package optimum\.neuron.*AWS") as told:
        load(compiled)
    assert "\n" not in str(told.value)


def test_a_missing_device_is_one_clear_line(compiled: Path) -> None:
    def from_pretrained(_path: str) -> OptimumModel:
        raise ValueError("The model requires at least 2 Neuron cores but only 0 are available.\n..")

    library = package(
        "optimum.neuron", NeuronModelForCausalLM=SimpleNamespace(from_pretrained=from_pretrained)
    )
    with (
        installed(optimum=ModuleType("optimum"), optimum__neuron=library),
        pytest.raises(ModelError, match=r"did not load: .*only 0 are available\.$"),
    ):
        load(compiled)


def test_a_folder_that_was_not_compiled_is_refused() -> None:
    with pytest.raises(ModelError, match=r"was not compiled for Neuron.*neuron_config\.json"):
        load(tiny_llama_folder())


def test_what_it_does_not_do_is_refused(compiled: Path) -> None:
    with pytest.raises(ModelError, match="LoRA adapters are not served"):
        load(compiled, adapters=(("poet", compiled),))
    with pytest.raises(ModelError, match=r"starts its own ranks: .*compile the model for them"):
        load(compiled, world=2)
    with pytest.raises(ModelError, match="--dtype float32: a compiled model has it in itself"):
        load(compiled, dtype="float32")
    with pytest.raises(ModelError, match="--device cpu: a compiled model has it in itself"):
        load(compiled, device="cpu")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("optimum", {"continuous_batching": False}, "continuous batching"),
        ("optimum", {"max_batch_size": 99}, "continuous batching"),
        ("nxdi", {"on_device_sampling_config": {}}, "sampling on the device"),
        ("nxdi", {"is_block_kv_layout": True}, "is_block_kv_layout"),
        ("nxdi", {"async_mode": True}, "async_mode"),
        ("nxdi", {"ctx_batch_size": 2}, "ctx_batch_size=1"),
        ("nxdi", {"tkg_batch_size": 1}, "tkg_batch_size"),
        ("nxdi", {"enable_fused_speculation": True}, "for speculation"),
        ("nxdi", {"is_medusa": True}, "for speculation"),
        ("nxdi", {"speculation_length": 4}, "for speculation"),
        ("optimum", {"output_logits": True}, "output_logits"),
    ],
)
def test_a_model_compiled_in_another_way_is_refused(
    kind: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make(kind, **given)
