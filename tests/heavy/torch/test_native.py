"""Kernels of our own for CPUs: the numbers of torch and the library, whatever the neighbours."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.models.llama import modeling_llama

from shards.engines import native_build, torch_native, torch_native_trial
from shards.engines.base import Admit, ModelError, Plan, SamplingParams
from shards.engines.torch_attention import Shape
from shards.engines.torch_devices import cpu_has_bfloat16
from shards.engines.torch_engine import TorchEngine
from shards.engines.torch_linear import Packed
from shards.engines.torch_native import Native
from shards.engines.torch_native_layers import GatedMlp, Rotary
from shards.engines.torch_norms import Norm
from shards.engines.torch_views import Kind
from tests.engines.contract import EngineContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import smollm2_folder
from tests.heavy.reference import read
from tests.heavy.torch.made import make, random_model

BFLOAT16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not cpu_has_bfloat16() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="this processor does not multiply bfloat16 numbers",
)


@pytest.fixture(scope="module")
def native() -> Native:
    return Native()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Heads of 64 numbers, which the kernel for attention takes."""
    random_model(tmp_path, "llama", hidden_size=128, head_dim=64, initializer_range=0.1)
    return tmp_path


def numbers(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(BFLOAT16)


@pytest.mark.parametrize(("width", "outs"), [(576, 960), (64, 64), (96, 1000), (1536, 130)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_a_linear_layer(
    native: Native, width: int, outs: int, biased: bool
) -> None:
    weight, bias = numbers(outs, width), numbers(outs) if biased else None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    address = torch.ops.mkldnn.data_ptr(packed)
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 32, 70):
        x = numbers(rows, width)
        seen = native.product(x, address, outs, bias)
        wide = None if bias is None else bias.float()
        expected = nn.functional.linear(x.float(), weight.float(), wide)
        torch.testing.assert_close(seen.float(), expected, rtol=0.01, atol=0.2)
        for row in range(0, rows, 5):
            assert torch.equal(seen[row], native.product(x[row : row + 1], address, outs, bias)[0])


def test_a_layer_that_lies_otherwise_stays_with_onednn(native: Native) -> None:
    """250 columns are filled up to 256 by oneDNN, which the kernel does not know."""
    weight = numbers(190, 250)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    layer, x = Packed(packed, None, native), numbers(5, 250)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_norms_and_gates_are_those_of_torch(native: Native, rows: int) -> None:
    x, weight = 3 * numbers(1, rows, 576), numbers(576)
    expected = rms_norm(x, (576,), weight, 1e-5)
    torch.testing.assert_close(native.norm(x, (576,), weight, 1e-5), expected, rtol=0.02, atol=0.02)
    gate, up = x.split(288, dim=-1)
    expected = silu(gate) * up
    torch.testing.assert_close(native.gated(x), expected, rtol=0.02, atol=0.02)


def test_numbers_that_are_none_stay_so(native: Native) -> None:
    """A row with such a number fails by itself, so it must be seen in what comes of the row."""
    x = numbers(3, 128)
    x[1, 7] = float("nan")
    assert native.gated(x).isnan().any(dim=-1).tolist() == [False, True, False]
    normed = native.norm(x, (128,), torch.ones(128, dtype=BFLOAT16), 1e-5)
    assert normed.isnan().all(dim=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_rotary_embeddings_are_the_librarys_to_the_bit(native: Native, tokens: int) -> None:
    plain = modeling_llama.apply_rotary_pos_emb
    both = numbers(1, tokens, 12, 64).transpose(1, 2)
    q, k = both[:, :9], both[:, 9:]
    angles = torch.rand(1, tokens, 64)
    cos, sin = angles.cos().to(BFLOAT16), angles.sin().to(BFLOAT16)
    rotary, expected = Rotary(plain, native), plain(q, k, cos, sin)
    with torch.inference_mode():
        seen = rotary(q, k, cos, sin)
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
    # What is not an engine's, and other shapes, are the library's own affair.
    wide = [tensor.float() for tensor in (q, k, cos, sin)]
    assert torch.equal(rotary(*wide)[0], plain(*wide)[0])


SHAPES = [
    Shape(9, 3, 64, 64, 0.125, Kind()),
    Shape(4, 4, 96, 128, 0.2, Kind()),
    Shape(8, 1, 256, 64, 0.06, Kind(softcap=20.0)),
    Shape(6, 2, 64, 64, 0.125, Kind(window=20)),
    Shape(64, 1, 64, 64, 0.125, Kind(window=70, softcap=5.0)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_attention_is_that_of_torch(native: Native, shape: Shape, page_tokens: int) -> None:
    """By the trial at load: a chunk and a token of two sequences, with sinks and without."""
    assert torch_native_trial.attends(native, [shape], page_tokens)


def test_the_trial_notices_another_attention(
    native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = native.attend
    monkeypatch.setattr(native, "attend", lambda *given: right(*given) * 1.1)
    assert not torch_native_trial.attends(native, SHAPES[:1], 16)


@pytest.mark.parametrize(
    ("shape", "page_tokens"),
    [
        (Shape(4, 2, 80, 64, 1.0, Kind()), 16),
        (Shape(4, 2, 64, 96, 1.0, Kind()), 16),
        (Shape(65, 1, 64, 64, 1.0, Kind()), 16),
        (SHAPES[0], 8),
    ],
)
def test_other_layers_are_left_to_torch(native: Native, shape: Shape, page_tokens: int) -> None:
    assert not torch_native_trial.attends(native, [shape], page_tokens)


# An engine --------------------------------------------------------------------------------------


def logits(engine: TorchEngine, prompts: Sequence[Sequence[int]], parts: int = 1) -> list[Any]:
    """Behind each prompt, computed in so many parts together with the others'."""
    engine.reset()
    admits = [Admit(n, list(one), len(one), SamplingParams()) for n, one in enumerate(prompts)]
    seen: list[Any] = []
    compute = engine._logits
    engine._logits = lambda layout: seen.append(compute(layout).float()) or seen[-1]  # type: ignore[method-assign]
    for part in range(parts):
        ends = [(len(one) * part // parts, len(one) * (part + 1) // parts) for one in prompts]
        work = [(n, end - start) for n, (start, end) in enumerate(ends)]
        engine.step(Plan(admits=[] if part else admits, work=work))
    engine._logits = compute  # type: ignore[method-assign]
    return list(seen[-1])


def test_layers_are_replaced(folder: Path) -> None:
    found = modeling_llama.apply_rotary_pos_emb
    engine = make(folder, dtype="bfloat16")
    modules = [type(module) for module in engine._model._model.modules()]
    assert modules.count(GatedMlp) == 3
    assert modules.count(Norm) == 7
    assert isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
    assert engine._model.step.native is not None
    assert not engine.describe().warnings
    engine.close()
    assert modeling_llama.apply_rotary_pos_emb is found, "it is one for all models of a process"


@pytest.mark.parametrize("threads", [1, 2])
def test_neighbours_and_chunks_change_no_bit(folder: Path, threads: int) -> None:
    """A row depends on no other one, and a token on no cut of the prompt before it."""
    engine = make(folder, dtype="bfloat16", threads=threads)
    prompts = [[(7 * n + 13 * k) % 250 for k in range(20 + 31 * n)] for n in range(3)]
    together = logits(engine, prompts)
    cut = logits(engine, prompts, parts=3)
    for prompt, seen, other in zip(prompts, together, cut, strict=True):
        assert torch.equal(seen, logits(engine, [prompt])[0])
        assert torch.equal(seen, other)
    engine.close()


def test_smollm2_is_as_near_to_single_precision_as_without() -> None:
    """Real weights; both round to eight bits, in other places."""
    prompts = [one["prompt"] for one in read()][:8]
    found = {}
    for name, dtype, extra in (
        ("exact", "float32", {}),
        ("plain", "bfloat16", {"native": "off"}),
        ("native", "bfloat16", {"native": "on"}),
    ):
        engine = make(smollm2_folder(), dtype=dtype, extra=extra, kv_tokens=4096)
        found[name] = torch.stack([logits(engine, [prompt])[0] for prompt in prompts])
        engine.close()
    plain, native = (
        (found[name] - found["exact"]).square().mean().sqrt() for name in ("plain", "native")
    )
    assert native < 1.1 * plain


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    folder = tmp_path_factory.mktemp("native")
    random_model(folder, "llama", hidden_size=128, head_dim=64, initializer_range=0.1)
    engine = make(folder, dtype="bfloat16", extra={"native": "on"})
    yield engine
    engine.close()


class TestContract(PromptContract, EngineContract):
    """The contract of all engines, kept with the kernels."""

    @pytest.fixture
    def engine(self, made: TorchEngine) -> TorchEngine:
        made.reset()
        return made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]


# Where there are none ---------------------------------------------------------------------------


@pytest.fixture
def built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Kernels are compiled anew, and kept in a folder of the test's own, which this is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch_native.library.cache_clear()
    yield tmp_path / "cache" / "roundhouse" / "torch"
    torch_native.library.cache_clear()


@pytest.mark.usefixtures("built_anew")
def test_without_a_compiler_torch_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = make(folder, dtype="bfloat16")
    (warning,) = engine.describe().warnings
    assert "no C++ compiler (no-such-compiler)" in warning
    assert engine._model.step.native is None
    engine.close()
    with pytest.raises(ModelError, match=r"native=on: there is no C\+\+ compiler .* leave it out"):
        make(folder, dtype="bfloat16", extra={"native": "on"})


def test_a_compiler_that_fails_is_named_in_one_line(
    built_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wrong.cpp").write_text("this is no program;\n")
    monkeypatch.setattr(torch_native, "SOURCE", tmp_path / "wrong.cpp")
    with pytest.raises(native_build.BuildError, match=r"failed: .*error") as caught:
        Native()
    assert "\n" not in str(caught.value)
    assert not list(built_anew.iterdir())


def test_kernels_are_compiled_once(built_anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Native()
    (kept,) = built_anew.iterdir()
    torch_native.library.cache_clear()
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled again"))
    Native()
    assert list(built_anew.iterdir()) == [kept]


def test_a_folder_in_which_others_write_is_not_trusted(built_anew: Path) -> None:
    built_anew.mkdir(parents=True)
    built_anew.chmod(0o777)
    assert Native().gated(numbers(1, 64)).shape == (1, 32)
    assert not list(built_anew.iterdir())


@pytest.mark.usefixtures("built_anew")
def test_what_cannot_be_loaded_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as what a full disk has left of it."""
    compile_ = native_build._compile

    def half(*given: Any) -> Path:
        path: Path = compile_(*given)
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        monkeypatch.setattr(native_build, "_compile", compile_)
        return path

    monkeypatch.setattr(native_build, "_compile", half)
    with pytest.raises(native_build.BuildError):
        Native()
    assert Native().gated(numbers(1, 64)).shape == (1, 32)


def test_what_has_no_kernels_says_so(folder: Path) -> None:
    with pytest.raises(ModelError, match="native=on: the kernels are for packed bfloat16 weights"):
        make(folder, dtype="float32", extra={"native": "on"})
