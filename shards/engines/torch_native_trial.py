"""Whether the native kernel attends as torch does, tried before it serves a model."""

from collections.abc import Sequence

import torch

from shards.engines.native_trial import TRIED, trial_step
from shards.engines.torch_attention import Shape, attend_dense
from shards.engines.torch_native import Cache, Native
from shards.engines.torch_views import causal_mask
from shards.kv import StepLayout

# Weights and results are rounded to 8 bits.
_TOLERANCE = 0.03


def attends(native: Native, shapes: Sequence[Shape], page_tokens: int) -> bool:
    """Whether the kernel has attention for all layers, and it is torch's, up to rounding."""
    return all(
        native.attends(shape, page_tokens) and _same(native, shape, page_tokens)
        for shape in dict.fromkeys(shapes)
    )


def _same(native: Native, shape: Shape, page_tokens: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).bfloat16()

    layout = trial_step(page_tokens)
    tokens = len(layout.cells)
    caches = [
        numbers(int(layout.tables.max()) + 1, page_tokens, shape.kv_heads, dim)
        for dim in (shape.key_dim, shape.value_dim)
    ]
    query = numbers(shape.heads, tokens, shape.key_dim)
    key = numbers(shape.kv_heads, tokens, shape.key_dim)
    value = numbers(shape.kv_heads, tokens, shape.value_dim)
    sinks = numbers(shape.heads)
    for given in (None, sinks):
        native.begin(layout)
        seen = native.attend(Cache(shape, *caches), query, key, value, given)
        expected = _expected(layout, caches, query, shape, given)
        if not torch.allclose(seen.float(), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return False
    return True


def _expected(
    layout: StepLayout,
    caches: Sequence[torch.Tensor],
    query: torch.Tensor,
    shape: Shape,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """In single precision, once the kernel has written the step's keys and values."""
    out = []
    for row, (count, length) in enumerate(TRIED):
        pages = torch.from_numpy(layout.tables[row])
        key, value = (
            cache[pages].flatten(0, 1)[:length].transpose(0, 1).float() for cache in caches
        )
        start = int(layout.starts[row])
        mine = query[:, start : start + count].float()
        mask = causal_mask(length - count, 0, count, length, shape.kind, mine)
        out.append(attend_dense(mine, key, value, mask, shape, sinks).transpose(0, 1))
    return torch.cat(out)
