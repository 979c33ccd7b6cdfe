"""Linear layers that are joined and packed: the same numbers, held once."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shards.engines import torch_linear
from shards.engines.base import ModelError
from shards.engines.torch_devices import cpu_has_bfloat16
from shards.engines.torch_linear import Packed, Table, can_pack, fuse, pack
from shards.engines.torch_ranks import RowLinear
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.made import answer, make, random_model

PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(9 + 7 * n)] for n in range(1, 4)]
COUNT = 12
packing = pytest.mark.skipif(
    not can_pack(torch.float32), reason="this processor or torch has no packed products"
)
PACKED_TYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)]
each_type = pytest.mark.parametrize("dtype", PACKED_TYPES, ids=str)
# Two sums of bfloat16 numbers in different orders differ by some of their 8 bits.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.1)}


def readable(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN packs for this processor in the blocks that an embedding can read."""
    weight = torch.randn(320, 64, dtype=dtype)
    return Table(torch.ops.mkldnn._reorder_linear_weight(weight)).holds(weight)


class Gated(nn.Module):  # type: ignore[misc]
    """The names that are joined, and one layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(250, 190), nn.Linear(250, 380)
        self.down_proj = nn.Linear(380, 250, bias=False)

    def forward(self, x: Any) -> Any:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(up) + gate.sum(-1, keepdim=True)


def kinds(model: Any) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def close(seen: Any, expected: Any) -> None:
    relative, absolute = TOLERANCES[expected.dtype]
    torch.testing.assert_close(seen, expected, rtol=relative, atol=absolute)


@each_type
@pytest.mark.parametrize("joined", [False, True])
def test_packed_layers_compute_the_same(joined: bool, dtype: torch.dtype) -> None:
    """Also for rows that do not fill a block, none, and views that are not contiguous."""
    model = Gated().eval().requires_grad_(False).to(dtype)
    inputs = [torch.randn(1, rows, 250, dtype=dtype) for rows in (0, 1, 3, 8, 70)]
    inputs.append(torch.randn(1, 250, 5, dtype=dtype).transpose(1, 2))
    expected = [model(x) for x in inputs]
    if joined:
        fuse(model)
    pack(model)
    assert kinds(model).count("Packed") == (2 if joined else 3)
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    for x, wanted in zip(inputs, expected, strict=True):
        close(model(x), wanted)


@packing
def test_a_packed_weight_is_held_once() -> None:
    model = nn.Sequential(nn.Linear(128, 256))
    before = model[0].weight.detach().clone()
    gone = weakref.ref(model[0].weight)
    pack(model)
    assert isinstance(model[0], Packed)
    assert gone() is None
    assert torch.equal(model[0].weight, before)  # made anew for whoever asks
    assert [name for name, _ in model.named_parameters()] == ["0.bias"]


def tied(rows: int, width: int) -> Any:
    model = nn.ModuleDict({"head": nn.Linear(width, rows), "embedding": nn.Embedding(rows, width)})
    model["head"].weight = model["embedding"].weight
    return model.requires_grad_(False)


@each_type
@pytest.mark.parametrize(("rows", "width"), [(320, 64), (1000, 250), (5000, 96)])
def test_an_embedding_reads_the_head_that_is_tied_to_it(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    model = tied(rows, width).to(dtype)
    gone = weakref.ref(model["head"].weight)
    tokens = torch.tensor([[0, 1, 63, 64, rows - 1, 65, 1]])
    x = torch.randn(1, 5, width, dtype=dtype)
    looked_up, product = model["embedding"](tokens), model["head"](x)
    pack(model)
    whole = readable(dtype)
    assert kinds(model)[1:] == (["Packed", "Table"] if whole else ["Linear", "Embedding"])
    assert (gone() is None) == whole
    assert torch.equal(model["embedding"](tokens), looked_up)
    assert torch.equal(model["embedding"].weight, model["head"].weight)
    close(model["head"](x), product)


@packing
def test_another_order_of_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if oneDNN had its blocks in other ways: the head stays plain, and tied."""
    for name, value in (("_COLUMN_BYTES", 8), ("_ROWS", 32)):
        model = tied(320, 64)
        with monkeypatch.context() as patched:
            patched.setattr(torch_linear, name, value)
            pack(model)
        assert kinds(model)[1:] == ["Linear", "Embedding"]
        assert model["head"].weight is model["embedding"].weight


@packing
def test_what_anything_else_uses_stays_plain() -> None:
    """An embedding of its own kind, which computes more; a weight that three share."""
    model = tied(320, 64)
    model["embedding"].__class__ = type("Scaled", (nn.Embedding,), {})
    pack(model)
    assert kinds(model)[1:] == ["Linear", "Scaled"]
    model = tied(320, 64)
    model["third"] = nn.Linear(64, 320)
    model["third"].weight = model["head"].weight
    pack(model)
    assert kinds(model)[1:] == ["Linear", "Embedding", "Linear"]


@packing
def test_what_would_be_mostly_padding_stays_plain() -> None:
    """Packed, a layer of three outputs would take as much as one of 64."""
    model = nn.Sequential(nn.Linear(128, 3), nn.Linear(128, 320))
    pack(model)
    assert kinds(model)[1:] == ["Linear", "Packed"]


@packing
def test_a_ranks_part_is_packed() -> None:
    class Alone:
        def sum(self, tensor: Any) -> Any:
            return tensor

    linear = nn.Linear(64, 128).requires_grad_(False)
    x = torch.randn(1, 4, 64)
    expected = linear(x)
    model = nn.Sequential(RowLinear(linear, Alone()))  # type: ignore[arg-type]
    pack(model)
    assert type(model[0].linear) is Packed
    close(model(x), expected)


def test_a_joined_layer_answers_for_another_input_too() -> None:
    """The others take their part of what the first computed only if the input is that very one."""
    model = Gated().eval().requires_grad_(False)
    one, other = torch.randn(1, 4, 250), torch.randn(1, 4, 250)
    expected = model.up_proj(other)
    fuse(model)
    model.gate_proj(one)
    close(model.up_proj(other), expected)
    model.gate_proj(other)
    close(model.up_proj(other), expected)


# In the engine ----------------------------------------------------------------------------------


@packing
def test_the_engine_packs_by_itself_and_says_the_same() -> None:
    folder = tiny_llama_folder()
    packed, plain = make(folder), make(folder, extra={"pack": "off"})
    assert kinds(packed._model._model).count("Packed") == 3 * 4 + 1  # four in each layer, the head
    assert not {"Packed", "Lead"} & set(kinds(plain._model._model))
    assert packed.describe().weight_bytes == plain.describe().weight_bytes
    assert answer(packed, PROMPTS, COUNT) == answer(plain, PROMPTS, COUNT)
    packed.close()
    plain.close()


@packing
def test_a_tied_model_is_packed_whole(tmp_path: Path) -> None:
    random_model(tmp_path, "llama", tie_word_embeddings=True, intermediate_size=128)
    packed, plain = make(tmp_path), make(tmp_path, extra={"pack": "off"})
    names = kinds(packed._model._model)
    whole = readable()
    assert ("Table" in names) == whole
    assert bool({"Linear", "Embedding"} & set(names)) == (not whole)
    assert packed.describe().weight_bytes == plain.describe().weight_bytes
    assert answer(packed, PROMPTS, COUNT) == answer(plain, PROMPTS, COUNT)
    packed.close()
    plain.close()


def test_bfloat16_is_packed_where_the_processor_multiplies_it() -> None:
    engine = make(tiny_llama_folder(), dtype="bfloat16")
    packed = "Packed" in kinds(engine._model._model)
    assert packed == (torch.bfloat16 in PACKED_TYPES)
    assert not packed or cpu_has_bfloat16()
    assert answer(engine, PROMPTS, COUNT)
    engine.close()


@packing
def test_float16_is_left_to_torch() -> None:
    engine = make(tiny_llama_folder(), dtype="float16")
    assert "Packed" not in kinds(engine._model._model)
    engine.close()


def test_without_such_kernels_layers_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama_folder()
    expected = make(folder)
    wanted = answer(expected, PROMPTS, COUNT)
    expected.close()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    engine = make(folder)
    assert "Packed" not in kinds(engine._model._model)
    assert answer(engine, PROMPTS, COUNT) == wanted
    engine.close()
    with pytest.raises(ModelError, match="pack=on: this torch has no packed products") as caught:
        make(folder, extra={"pack": "on"})
    assert "\n" not in str(caught.value)


def test_an_unknown_way_to_pack_is_refused() -> None:
    with pytest.raises(ModelError, match="pack"):
        make(tiny_llama_folder(), extra={"pack": "maybe"})
