"""Compiled layers, by the compiler's backend for CPUs: the contract, many models, what goes wrong.

Steps are padded and packed as for graphs, and run directly instead of replayed.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from shards.engines import load, torch_compile
from shards.engines.base import Admit, Engine, EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.torch_attention import NAME, attend
from shards.engines.torch_engine import LOADING, TorchEngine
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import answer, assert_same, make, random_model, reference
from tests.heavy.torch.test_architectures import ARCHITECTURES, COUNT, PROMPTS

ON = {"compile": "on"}
# Steps of one row, and of more.
SHAPES = 2
# A layer is cut where it attends, and so are its attention and what is around that.
PIECES_MAX = 4


@pytest.fixture(scope="class")
def made() -> Iterator[Engine]:
    """Fails if a step meets anything that was not compiled at load."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch_compile, "_SERVING", "fail_on_recompile")
        engine = make(tiny_llama_folder(), extra=ON)
        yield engine
        engine.close()


class TestContract(GrammarContract, PromptContract, EngineContract):
    @pytest.fixture
    def engine(self, made: Engine) -> Engine:
        made.reset()
        assert made.describe().warnings == ()
        return made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]


def pieces() -> int:
    """How many graphs were compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral", "mixtral", "opt", "qwen2"])
def test_many_models_answer_as_transformers_does(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, experts, biases, norms that nothing else has, and no rotary angles at all."""
    monkeypatch.setattr(torch_compile, "_SERVING", "fail_on_recompile")
    torch.compiler.reset()
    model = random_model(tmp_path, name, **ARCHITECTURES[name])
    before = pieces()
    engine = make(tmp_path, extra=ON)
    assert engine.describe().warnings == ()
    compiled = pieces() - before
    assert SHAPES < compiled <= SHAPES * PIECES_MAX * len(engine._model.kinds)
    seen = answer(engine, PROMPTS, COUNT)
    assert pieces() - before == compiled, "nothing is compiled while serving"
    engine.close()
    for prompt, tokens in zip(PROMPTS, seen, strict=True):
        assert_same(tokens, *reference(model, prompt, COUNT))


def test_layers_are_compiled_once_for_all_of_a_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    monkeypatch.setattr(torch_compile, "_SERVING", "fail_on_recompile")
    for layers in (2, 7):
        torch.compiler.reset()
        random_model(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        before = pieces()
        # As many rows as a head, or half of one, has numbers.
        engine = make(tmp_path / str(layers), extra=ON, sequences_max=16)
        assert len(engine._model.blocks()) == layers
        answer(engine, PROMPTS, 8)
        engine.close()
        counts.append(pieces() - before)
    assert counts == [SHAPES * PIECES_MAX] * 2


def test_only_decode_steps_meet_the_compiler() -> None:
    made = make(tiny_llama_folder(), extra=ON)
    (block, *_) = made._model.blocks()
    calls: list[int] = []
    plain = type(block).forward

    def counted(self: object, *arguments: object, **given: object) -> object:
        calls.append(1)
        return plain(self, *arguments, **given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(block), "forward", counted)
        admit = Admit(1, PROMPTS[0], len(PROMPTS[0]), SamplingParams())
        made.step(Plan(admits=[admit], work=[(1, len(PROMPTS[0]))]))
        assert len(calls) == len(made._model.blocks())
        made.step(Plan(work=[(1, 1)]))
        assert len(calls) == len(made._model.blocks()), "decoded by the compiled ones"
    assert "forward" not in block.__dict__
    assert transformers.AttentionInterface._global_mapping[NAME] is attend
    made.close()


def test_progress_is_told_while_layers_are_compiled() -> None:
    told: list[float] = []
    torch.compiler.reset()
    options = EngineOptions(
        tiny_llama_folder(), "model", kv_tokens=256, sequences_max=4, extra=(("compile", "on"),)
    )
    load("torch", options, told.append).close()
    assert told == sorted(told)
    assert len([share for share in told if LOADING < share < 1.0]) >= 2 * SHAPES
    assert told[-1] == 1.0


def test_what_is_compiled_is_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _name: spoiled(torch.zeros_like))
    folder = tmp_path / "roundhouse" / "torch"
    make(tiny_llama_folder(), extra=ON).close()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700, "nobody else puts code there"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    make(tiny_llama_folder(), extra=ON).close()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


# What goes wrong --------------------------------------------------------------------------------


def spoiled(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    """A backend whose pieces compute something else."""

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(change(one) if torch.is_tensor(one) else one for one in graph(*given))

        return run

    return backend


def assert_plain(engine: TorchEngine, reason: str) -> None:
    (warning,) = engine.describe().warnings
    assert warning.startswith("layers run as they are, not compiled: ")
    assert reason in warning
    assert "\n" not in warning
    assert len(warning) < 300
    plain = make(tiny_llama_folder(), extra={"pack": "off"})
    assert answer(engine, PROMPTS, COUNT) == answer(plain, PROMPTS, COUNT)
    engine.close()
    plain.close()


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda one: one * float("nan")])
def test_layers_that_compute_something_else_stay_plain(
    wrong: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _name: spoiled(wrong))
    assert_plain(make(tiny_llama_folder(), extra=ON), "in steps of 8 they compute something else")


def test_without_a_c_compiler_layers_stay_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # not what was compiled before
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "none"),)}):
        engine = make(tiny_llama_folder(), extra=ON)
    assert_plain(engine, "No working C++ compiler found")


def test_another_torch_that_lacks_something_leaves_layers_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not documented may be gone in the next release."""
    monkeypatch.setitem(sys.modules, "torch._inductor.async_compile", None)
    assert_plain(make(tiny_llama_folder(), extra=ON), "torch._inductor.async_compile")


def test_layers_of_ever_new_shapes_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that needs another variant for each layer would be compiled for hours."""
    torch.compiler.reset()
    monkeypatch.setattr(torch_compile, "_VARIANTS_MAX", 1)
    assert_plain(make(tiny_llama_folder(), extra=ON), "recompile_limit")


def test_a_model_without_a_list_of_layers_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.engines.torch_model.PagedModel.blocks", lambda _self: [])
    assert_plain(make(tiny_llama_folder(), extra=ON), "are not told apart")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"pack": "on"}, "packed weights cannot be compiled"),
        ({"graphs": "off"}, "is for decode steps that are captured"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, str], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        make(tiny_llama_folder(), extra={**ON, **more})
    assert "leave" in str(caught.value)


def test_on_a_cpu_nothing_is_compiled_unasked() -> None:
    engine = make(tiny_llama_folder())
    assert engine._graphs is None
    engine.close()
