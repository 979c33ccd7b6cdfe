"""Paged attention as an attention function of the ``transformers`` library.

A step is one flat batch of tokens. For each layer the keys and values of its tokens are written to
their cells; then sequences that decode (one token each) attend together, on GPUs by a kernel that
follows their tables (``torch_kernel``), else over pages gathered side by side; and every other
sequence by itself, as ``torch_views`` says.

Queries of the heads that share a KV head are laid out as rows of one matrix, so that keys and
values are never repeated, and every kernel of ``scaled_dot_product_attention`` can be used. (On a
CPU this is five times as fast as its own grouping of heads: 32 sequences of 96 tokens.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from shards.engines.torch_views import Chunk, Decodes, Kind, View, Viewer, causal_mask
from shards.kv import StepLayout

if TYPE_CHECKING:
    from shards.engines.torch_kernel import PagedKernel
    from shards.engines.torch_native import Cache, Native

NAME = "roundhouse_paged"
Given = Mapping[str, Any]
"""What a model says to its attention function beside the tensors."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer on this rank, and the factor of its scores."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    kind: Kind

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Of KV cache."""
        return self.kv_heads * (self.key_dim + self.value_dim) * int(dtype.itemsize)


class Step:
    """What all layers see of the step under way: where tokens go, and one view for each kind.

    If ``kernel`` is not None, it writes to the cells, and attends for decoding sequences. If
    ``native`` is not None, it does all of it, by what it was told of the step itself.
    """

    def __init__(self, kernel: "PagedKernel | None" = None) -> None:
        self.kernel = kernel
        self.native: Native | None = None
        self.cells: Any = None
        self.views: dict[Kind, View] = {}

    def begin(self, layout: StepLayout, kinds: Sequence[Kind], viewer: Viewer) -> None:
        """Says what the layers compute next."""
        if self.native is not None:
            self.native.begin(layout)
            return
        self.views = {kind: viewer.view(layout, kind) for kind in kinds}
        self.cells = viewer.tensor(layout.cells.astype(np.int64))


class PagedLayer:
    """Keys and values of one layer, and attention over them.

    The cache is [pages + 1, page_tokens, kv_heads, head_dim]; page 0 is the one for padding.
    """

    def __init__(
        self, shape: Shape, page_count: int, page_tokens: int, dtype: Any, device: Any, step: Step
    ) -> None:
        self._shape = shape
        self._step = step
        size = (page_count + 1, page_tokens, shape.kv_heads)
        self.keys = torch.zeros((*size, shape.key_dim), dtype=dtype, device=device)
        self.values = torch.zeros((*size, shape.value_dim), dtype=dtype, device=device)
        self._key_cells = self.keys.view(-1, shape.kv_heads, shape.key_dim)
        self._value_cells = self.values.view(-1, shape.kv_heads, shape.value_dim)
        self._cache: Cache | None = None
        if step.native is not None:
            self._cache = step.native.cache(shape, self.keys, self.values)

    def attend(self, _module: Any, query: Any, key: Any, value: Any, given: Given) -> Any:
        """Attention for the tokens of the step; see ``attend``."""
        query, key, value = query[0], key[0], value[0]
        step, sinks = self._step, given.get("s_aux")
        if step.native is not None and self._cache is not None:
            return step.native.attend(self._cache, query, key, value, sinks)[None]
        if step.kernel is not None:
            step.kernel.write(key, value, step.cells, self.keys, self.values)
        else:
            self._key_cells.index_copy_(0, step.cells, key.transpose(0, 1))
            self._value_cells.index_copy_(0, step.cells, value.transpose(0, 1))
        view = step.views[self._shape.kind]
        rows = query.transpose(0, 1)
        if len(view.decodes) == 1 and not view.chunks:
            return self._decode(rows, view.decodes[0], sinks)[None]
        out = rows.new_empty((rows.shape[0], self._shape.heads, self._shape.value_dim))
        for decodes in view.decodes:
            out[decodes.rows] = self._decode(rows[decodes.rows], decodes, sinks)
        for chunk in view.chunks:
            part = slice(chunk.start, chunk.end)
            out[part] = self._extend(query[:, part], key[:, part], value[:, part], chunk, sinks)
        return out[None]

    def _decode(self, rows: Any, decodes: Decodes, sinks: Any) -> Any:
        """``rows`` [sequences, heads, dim], one token each; the same shape comes out."""
        shape, count = self._shape, decodes.count
        if self._step.kernel is not None:
            return self._step.kernel(rows, self.keys, self.values, decodes, shape, sinks)
        query = rows.reshape(count, shape.kv_heads, -1, shape.key_dim)
        key = _gathered(self.keys, decodes.pages, count)
        value = _gathered(self.values, decodes.pages, count)
        if decodes.prefix is not None:
            prefix = [_gathered(cache, decodes.prefix, 1) for cache in (self.keys, self.values)]
            out = attend_behind(query, prefix, (key, value), decodes.mask, shape)
        elif shape.kind.softcap or sinks is not None:
            sinks = None if sinks is None else sinks.view(shape.kv_heads, -1, 1)
            out = attend_plainly(query, key, value, decodes.mask, shape, sinks)
        else:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=decodes.mask, scale=shape.scale
            )
        return out.reshape(count, shape.heads, shape.value_dim)

    def _extend(self, query: Any, key: Any, value: Any, chunk: Chunk, sinks: Any) -> Any:
        """Several tokens of one sequence: ``query`` [heads, tokens, dim]; [tokens, heads, dim]."""
        if chunk.pages is not None:
            key = self.keys.index_select(0, chunk.pages).flatten(0, 1).transpose(0, 1)
            value = self.values.index_select(0, chunk.pages).flatten(0, 1).transpose(0, 1)
        return attend_dense(query, key, value, chunk.mask, self._shape, sinks).transpose(0, 1)


def _gathered(cache: Any, pages: Any, count: int) -> Any:
    """Pages of some sequences side by side: [sequences, kv_heads, cells, dim]."""
    found = cache.index_select(0, pages)
    return found.view(count, -1, *found.shape[2:]).transpose(1, 2)


def attend_dense(query: Any, key: Any, value: Any, mask: Any, shape: Shape, sinks: Any) -> Any:
    """One sequence: [heads, tokens, dim]; without a mask, the causal one over equally many keys."""
    if shape.kind.softcap or sinks is not None:
        if mask is None:
            mask = causal_mask(0, 0, query.shape[1], query.shape[1], shape.kind, query)
        grouped = query.reshape(shape.kv_heads, -1, query.shape[1], shape.key_dim)
        sinks = None if sinks is None else sinks.view(shape.kv_heads, -1, 1, 1)
        out = attend_plainly(grouped, key[:, None], value[:, None], mask, shape, sinks)
        return out.reshape(shape.heads, -1, shape.value_dim)
    group = shape.heads // shape.kv_heads
    if group > 1 and mask is not None and query.device.type != "cpu":
        # With a mask, CUDA's kernels that do not write all scores down want equally many heads.
        key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
        group = 1
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=shape.scale,
        enable_gqa=group > 1,
    )[0]


def attend_behind(
    query: Any, prefix: Sequence[Any], own: Sequence[Any], mask: Any, shape: Shape
) -> Any:
    """Attention over keys and values that all rows share, and over those that each has itself.

    ``query`` [rows, kv_heads, group, dim], ``prefix`` [1, kv_heads, cells, dim], ``own``
    [rows, kv_heads, cells, dim]. The shared part is one matrix product for all rows. The two are
    weighted by their sums of exponents, which the CPU's kernel tells (arXiv:2402.05099, section 3).
    """
    rows, kv_heads, group, _ = query.shape
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    together = query.transpose(0, 1).reshape(1, kv_heads, rows * group, -1)
    first, first_sum = kernel(together, *prefix, scale=shape.scale)
    second, second_sum = kernel(query, *own, attn_mask=mask, scale=shape.scale)
    first = first.reshape(kv_heads, rows, group, -1).transpose(0, 1)
    first_sum = first_sum.reshape(kv_heads, rows, group).transpose(0, 1)
    weight = torch.sigmoid(first_sum - second_sum)[..., None]
    return torch.lerp(second.float(), first.float(), weight).to(query.dtype)


def attend_plainly(query: Any, key: Any, value: Any, mask: Any, shape: Shape, sinks: Any) -> Any:
    """As ``scaled_dot_product_attention``, with capped scores or sinks; softmax in float32.

    A sink is one more score of a head, without a value; ``sinks`` must broadcast to the scores.
    """
    scores = (query @ key.transpose(-1, -2)).float() * shape.scale
    if shape.kind.softcap:
        scores = shape.kind.softcap * torch.tanh(scores / shape.kind.softcap)
    scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    column = sinks.float().expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat((scores, column), dim=-1), dim=-1)[..., :-1]
    return weights.to(value.dtype) @ value


def attend(
    module: Any, query: Any, key: Any, value: Any, _attention_mask: Any = None, **given: Any
) -> tuple[Any, None]:
    """The attention function that models of ``transformers`` call.

    ``query`` [1, heads, T, dim], ``key`` and ``value`` [1, kv_heads, T, dim]; [1, T, heads, dim].
    The state of a layer is an attribute of its attention module, so that several models can live
    in one process.
    """
    return module.roundhouse.attend(module, query, key, value, given), None
