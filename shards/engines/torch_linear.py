"""Linear layers as the processor likes them: joined where they share their input, and packed.

The projections to queries, keys and values read the same activations, as do the two halves of a
gated feed-forward network. As one matrix they are one kernel instead of two or three. The model's
own code still calls each layer by its name: the first computes all, the others take their part.

On CPUs weights are packed: kept in the blocks in which oneDNN reads them, and in no other form.
Plain weights are brought into such an order at each product, which is most of its work while there
are few rows. (SmolLM2-135M in float32 on two Zen 3 cores, the products of a step of 8, 32 and 256
rows: 57, 108 and 505 ms instead of 97, 139 and 551; in bfloat16 on two Zen 5 cores: 9, 15 and 75
instead of 13, 20 and 80.)
"""

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shards.engines.torch_devices import cpu_has_bfloat16

if TYPE_CHECKING:
    from shards.engines.torch_native import Native

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Levels of instructions, in torch's words, with which oneDNN's kernels for packed weights run.
_PACKING_LEVELS = {torch.float32: ("AVX2", "AVX512"), torch.bfloat16: ("AVX512",)}
# A layer whose last block of outputs would be mostly padding stays plain.
_PADDED_MAX = 1.15
# What uses a weight that may be packed: a linear layer, or an embedding and the head tied to it.
_PACKABLE = ([nn.Linear], [nn.Embedding, nn.Linear])
_ROWS, _COLUMN_BYTES = 64, 4
# Rows of an embedding that are compared at once.
_COMPARED = 4096
# Rows with which a kernel of our own is compared, and by how much sums in another order may differ.
_TRIED_ROWS, _TRIED_TOLERANCE = 3, 0.05


class Kept:
    """Outputs that were computed but not asked for yet, and the input that they belong to.

    Not attributes of the module, because setting those goes through a dozen checks.
    """

    __slots__ = ("input", "outputs")

    def __init__(self) -> None:
        self.input: Any = None
        self.outputs: list[Any] = []


class Lead(nn.Module):  # type: ignore[misc]
    """The first of some layers; computes the outputs of all, and keeps those of the others."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        self.sizes = [one.weight.shape[0] for one in linears]
        self.together = _joined(linears)
        self.kept = Kept()

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out of the first]."""
        first, *others = self.together(x).split_with_sizes(self.sizes, -1)
        self.kept.input, self.kept.outputs = x, others
        return first

    def take(self, place: int, x: Any) -> Any:
        """The output of another layer for the same input; computed again for any other input."""
        kept = self.kept
        if x is not kept.input:
            return self.together(x).split_with_sizes(self.sizes, -1)[place]
        out = kept.outputs[place - 1]
        if place == len(kept.outputs):
            kept.input, kept.outputs = None, []  # nothing is held longer than it is needed
        return out


class Follower(nn.Module):  # type: ignore[misc]
    """One of the other layers."""

    def __init__(self, lead: Lead, place: int) -> None:
        super().__init__()
        self._lead = (lead,)  # inside of a tuple, so that the weight is not counted twice
        self._place = place

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out]."""
        return self._lead[0].take(self._place, x)


def fuse(model: Any) -> None:
    """Multiplies together what can be; the model computes the same as before, up to rounding."""
    for module in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(module, name, None) for name in names]
            if not _alike(linears):
                continue
            lead = Lead(linears)
            setattr(module, names[0], lead)
            for place, name in enumerate(names[1:], start=1):
                setattr(module, name, Follower(lead, place))


def _alike(linears: list[Any]) -> bool:
    """Whether they are plain linear layers with inputs of one size."""
    if any(type(one) is not nn.Linear for one in linears):
        return False
    kinds = {(one.weight.shape[1], one.weight.dtype, one.bias is None) for one in linears}
    return len(kinds) == 1


def _joined(linears: list[Any]) -> Any:
    """One layer with the outputs of all, one after the other."""
    weight = torch.cat([one.weight.data for one in linears])
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        bias = torch.cat([one.bias.data for one in linears])
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


# Packed -----------------------------------------------------------------------------------------


class Packed(nn.Module):  # type: ignore[misc]
    """A linear layer whose weight is in oneDNN's order, multiplied by oneDNN or by our kernel."""

    def __init__(self, packed: Any, bias: Any, native: "Native | None" = None) -> None:
        super().__init__()
        self.packed = packed  # has no storage that a parameter could have
        self.bias = bias
        outs, self.width = packed.shape
        # Of several operators of that name this one; to find it takes as long as a small product.
        product = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
        self._product: Callable[[Any], Any] = lambda x: product(x, packed, bias, "none", [], "")
        if native is not None and not self.width % 2:
            kernel, address = native.product, torch.ops.mkldnn.data_ptr(packed)
            self._try(lambda x: kernel(x, address, outs, bias))

    def _try(self, product: Callable[[Any], Any]) -> None:
        """Multiplies in another way from now on, if that gives the same, up to rounding."""
        x = torch.randn(_TRIED_ROWS, self.width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, seen = self._product(x.bfloat16()).float(), product(x.bfloat16()).float()
        allowed = _TRIED_TOLERANCE * expected.abs().mean().item()
        if torch.allclose(seen, expected, rtol=_TRIED_TOLERANCE, atol=allowed):
            self._product = product

    @property
    def weight(self) -> Any:
        """A copy in the usual order, for code that looks at more than the layer's outputs."""
        return self.packed.to_dense()

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out]."""
        return self._product(x)


class Table(nn.Module):  # type: ignore[misc]
    """An embedding that reads its rows out of the packed weight of the head that is tied to it.

    Blocks are of 64 rows, column after column of 4 bytes (two columns in 16-bit types), and filled
    up to 16 such columns. That is oneDNN's own affair, so whoever makes a table must compare what
    it says (``holds``).
    """

    def __init__(self, packed: Any) -> None:
        super().__init__()
        self._packed = packed  # the memory that is read
        rows, self._width = packed.shape
        item = packed.dtype.itemsize
        together = _COLUMN_BYTES // item
        # Narrow matrices are filled up, others end where they end.
        size = torch.ops.mkldnn._nbytes(packed)  # noqa: SLF001
        held = -(-rows // _ROWS) * _ROWS
        columns, rest = divmod(size, held * _COLUMN_BYTES)
        self._blocks: Any = None
        if not rest and columns * together >= self._width:
            address = torch.ops.mkldnn.data_ptr(packed)
            memory = (ctypes.c_char * size).from_address(address)
            flat = torch.frombuffer(memory, dtype=packed.dtype)
            self._blocks = flat.view(-1, columns, _ROWS, together).transpose(1, 2)

    def holds(self, weight: Any) -> bool:
        """Whether these are the rows of an embedding, to the last bit."""
        if self._blocks is None:
            return False
        every = torch.arange(len(weight)).split(_COMPARED)
        return all(torch.equal(self(part), weight[part[0] : part[-1] + 1]) for part in every)

    @property
    def weight(self) -> Any:
        """As ``Packed.weight``."""
        return self._packed.to_dense()

    def forward(self, tokens: Any) -> Any:
        """Token ids of any shape to their rows [..., width]."""
        found = self._blocks[tokens // _ROWS, tokens % _ROWS]
        return found.flatten(-2)[..., : self._width]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor multiply by packed weights of a type.

    bfloat16 only where the processor multiplies such numbers: elsewhere nobody would ask for it.
    """
    level: str = torch.backends.cpu.get_cpu_capability()
    able = torch.backends.mkldnn.is_available() and level in _PACKING_LEVELS.get(dtype, ())
    return able and (dtype == torch.float32 or cpu_has_bfloat16())


def pack(model: Any, native: "Native | None" = None) -> None:
    """Packs the weights of plain linear layers, one after the other, and lets go of them.

    ``native`` are kernels that multiply by packed bfloat16 weights faster than oneDNN.

    A head that is tied to the embedding is packed if the embedding can read it then. A weight that
    anything else uses too stays as it is, so that none is held twice.
    """
    everywhere = model.named_parameters(remove_duplicate=False)
    users = Counter(parameter.data_ptr() for _, parameter in everywhere)
    for places in _by_weight(model).values():
        places.sort(key=lambda place: type(getattr(*place)) is nn.Linear)  # embeddings first
        modules = [getattr(parent, name) for parent, name in places]
        kinds = [type(module) for module in modules]
        weight = modules[0].weight.data
        if users[weight.data_ptr()] != len(places) or kinds not in _PACKABLE:
            continue
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001 - no public name
        if torch.ops.mkldnn._nbytes(packed) > _PADDED_MAX * weight.nbytes:  # noqa: SLF001
            continue
        made: list[Any] = [Packed(packed, modules[-1].bias, native)]
        if len(places) > 1:
            made.insert(0, Table(packed))
            if not _serves(made[0], modules[0]):
                continue
        for (parent, name), module in zip(places, made, strict=True):
            setattr(parent, name, module)
    _give_back()


def _give_back() -> None:
    """Returns what plain weights took to the system; GNU's allocator would keep a fifth of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _by_weight(model: Any) -> dict[int, list[tuple[Any, str]]]:
    """Where the modules are that have a weight, by its address: parent and name."""
    found: dict[int, list[tuple[Any, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            weight = child._parameters.get("weight")  # noqa: SLF001 - not one that is computed
            if weight is not None:
                found.setdefault(weight.data_ptr(), []).append((parent, name))
    return found


def _serves(table: Table, embedding: Any) -> bool:
    """Whether a table can take an embedding's place."""
    return embedding.max_norm is None and table.holds(embedding.weight.data)
