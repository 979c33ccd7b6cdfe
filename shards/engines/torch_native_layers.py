"""Modules of a model in whose place kernels of our own compute (``torch_native``).

The model's code stays the library's, so each module is tried with numbers before it is replaced,
and keeps what does anything else.
"""

import sys
from typing import Any

import torch
from torch import nn

from shards.engines.torch_linear import Lead, Packed
from shards.engines.torch_native import LANES, Native
from shards.engines.torch_norms import fuse_norms

_TRIED_ROWS = 7
_ROTARY = "apply_rotary_pos_emb"
# Activations that are silu, in torch's words and the library's.
_SILU = ("SiLU", "SiLUActivation")
# The kernel's exponential is not torch's, so a number may be rounded the other way.
_ROUNDINGS = 2.5


def use_native(model: Any, native: Native) -> None:
    """Has the kernels compute what they can of a model whose layers are joined and packed."""
    fuse_norms(model, native.norm, LANES)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            made = _gated(child, native)
            if made is not None:
                setattr(parent, name, made)
    for library in {type(module).__module__ for module in model.modules()}:
        _rotate_in(vars(sys.modules[library]), native)


class GatedMlp(nn.Module):  # type: ignore[misc]
    """A feed-forward network: down(silu(gate(x)) * up(x)), with gate and up as one matrix."""

    def __init__(self, gate_up: Any, down: Any, native: Native) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down_proj = down
        self._native = native

    def forward(self, x: Any) -> Any:
        """[..., width] to the same shape."""
        return self.down_proj(self._native.gated(self.gate_up(x)))


def _gated(module: Any, native: Native) -> GatedMlp | None:
    """The same network computed by the kernel, or None if that is not what a module is."""
    names = {name for name, _ in module.named_children()}
    lead = getattr(module, "gate_proj", None)
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or type(lead) is not Lead:
        return None
    gate_up, sizes = lead.together, lead.sizes
    if type(module.act_fn).__name__ not in _SILU or type(gate_up) is not Packed:
        return None
    if len(set(sizes)) != 1 or sizes[0] % LANES:
        return None
    made = GatedMlp(gate_up, module.down_proj, native)
    return made if _same(module, made, gate_up.width) else None


class _Marked(nn.Module):  # type: ignore[misc]
    """In the place of a layer: shows what it is given, and whether its output is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None
        self.mark = torch.zeros(1)

    def forward(self, x: Any) -> Any:
        """Always the same tensor."""
        self.seen = x
        return self.mark


def _same(before: Any, after: GatedMlp, width: int) -> bool:
    """Whether both give their last layer the same, and its output to whoever asked."""
    down, marked = before.down_proj, _Marked()
    x = _numbers(1, _TRIED_ROWS, width)
    found = []
    for module in (before, after):
        module.down_proj = marked
        with torch.inference_mode():
            passed = module(x) is marked.mark
        module.down_proj = down
        found.append(marked.seen.float() if passed else None)
    if found[0] is None or found[1] is None:
        return False
    allowed = _ROUNDINGS * torch.finfo(torch.bfloat16).eps
    return bool(torch.allclose(found[1], found[0], rtol=allowed, atol=allowed))


class Rotary:
    """The library's function for rotary embeddings, by the kernel where that does the same.

    It is one for all models of its file, so whatever is not computed by an engine's step, or has
    another shape, goes to the library's own; where it computes, not a bit differs.
    """

    def __init__(self, plain: Any, native: Native) -> None:
        self._plain = plain
        self._native = native

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
        """Queries and keys [1, heads, tokens, dim] by angles [1, tokens, dim]."""
        if more or named or not self._serves(q, k, cos, sin):
            return self._plain(q, k, cos, sin, *more, **named)
        return self._native.rotate(q, k, cos, sin)

    @staticmethod
    def _serves(q: Any, k: Any, cos: Any, sin: Any) -> bool:
        dim = q.shape[-1]
        return (
            torch.is_inference_mode_enabled()
            and q.dtype == k.dtype == cos.dtype == sin.dtype == torch.bfloat16
            and q.device.type == "cpu"
            and q.dim() == k.dim() == 4
            and not dim % (2 * LANES)
            and q.stride(3) == k.stride(3) == 1
            and cos.shape == sin.shape == (1, q.shape[2], dim)
            and len(q) == len(k) == 1
            and k.shape[2:] == q.shape[2:]
            and cos.is_contiguous()
            and sin.is_contiguous()
        )


def _rotate_in(library: dict[str, Any], native: Native) -> None:
    """Puts ``Rotary`` into a file of the library, if it computes the same there, to the bit."""
    plain = library.get(_ROTARY)
    if plain is None or isinstance(plain, Rotary):
        return
    made, dim = Rotary(plain, native), 2 * LANES
    q, k = (_numbers(1, _TRIED_ROWS, heads, dim).transpose(1, 2) for heads in (4, 2))
    cos, sin = (_numbers(1, _TRIED_ROWS, dim) for _ in range(2))
    with torch.inference_mode():
        try:
            expected = plain(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError):  # a function of that name for other shapes
            return
        seen = made(q, k, cos, sin)
    if all(torch.equal(mine, theirs) for mine, theirs in zip(seen, expected, strict=True)):
        native.replace_in(library, _ROTARY, made)


def _numbers(*shape: int) -> Any:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.bfloat16)
