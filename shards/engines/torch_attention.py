"""Paged attention as an attention function of the ``transformers`` library.

A step is one flat batch of tokens. For each layer the keys and values of its tokens are written to
their cells; then sequences that decode (one token each) attend together over pages gathered side by
side, and every other sequence by itself. What all layers have in common (which pages, which mask)
is prepared once for each kind of layer, see ``View``.

Queries of the heads that share a KV head are laid out as rows of one matrix, so that keys and
values are never repeated, and every kernel of ``scaled_dot_product_attention`` can be used.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from shards.kv import TRASH, Ints, StepLayout

NAME = "roundhouse_paged"
Given = Mapping[str, Any]
"""What a model says to its attention function beside the tensors."""

# Decoding sequences are padded to the longest of their group. A group is split where that saves so
# many cells; each group costs a few calls per layer, about as much as reading a hundred cells.
GROUP_CELLS = 1024
GROUPS_MAX = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """What attention does in a layer, beside its shapes.

    ``window``: how many tokens back it looks, itself included; 0: all. ``softcap``: scores are
    softcap * tanh(scores / softcap); 0: as they are.
    """

    window: int = 0
    softcap: float = 0.0


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


# What a step looks like to the layers of one kind -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences with one token each. ``rows`` are their tokens in the batch, or None for all.

    ``pages`` is [sequences * pages of the longest], ``mask`` [sequences, 1, 1, cells]: what is
    added to the scores.
    """

    rows: Any
    count: int
    pages: Any
    mask: Any


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several tokens: ``start`` to ``end`` of the batch.

    ``pages`` is None if the sequence begins with them, so that all keys are in the batch.
    ``mask`` is [tokens, cells], or None where it would be the causal one.
    """

    start: int
    end: int
    pages: Any
    mask: Any


@dataclass(frozen=True, slots=True)
class View:
    """One step, for the layers of one kind."""

    decodes: Sequence[Decodes]
    chunks: Sequence[Chunk]


def pages_seen(lengths: Ints, window: int, page_tokens: int) -> tuple[Ints, Ints]:
    """First page that the last token of each sequence sees, and one behind the last."""
    last = -(-lengths // np.int32(page_tokens))
    if not window:
        return np.zeros_like(lengths), last
    return np.maximum(lengths - np.int32(window), 0) // np.int32(page_tokens), last


def page_table(tables: Ints, first: Ints, last: Ints, width: int) -> Ints:
    """Pages ``first`` to ``last`` of each row, filled up with ``TRASH``: [rows, width]."""
    at = first[:, None] + np.arange(width, dtype=np.int32)
    found = np.take_along_axis(tables, np.minimum(at, tables.shape[1] - 1), axis=1)
    return np.where(at < last[:, None], found, np.int32(TRASH))


def decode_mask(lengths: Any, first: Any, cells: int, kind: Kind, page: int, dtype: Any) -> Any:
    """[rows, 1, 1, cells]: 0 where the last token of a row looks, else minus infinity.

    ``lengths`` and ``first`` (its first page) are tensors [rows]; the work is done where they are.
    """
    place = torch.arange(cells, device=lengths.device) + (first * page)[:, None]
    barred = place >= lengths[:, None]
    if kind.window:
        barred |= place < (lengths - kind.window)[:, None]
    mask = torch.zeros(barred.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(barred, float("-inf"))[:, None, None, :]


def groups(widths: NDArray[np.intp], page_tokens: int) -> Iterator[NDArray[np.intp]]:
    """Splits rows into groups whose padding is worth less than a group of its own costs."""
    order = np.argsort(-widths, kind="stable")
    made = 1
    while len(order):
        ordered = widths[order]
        # Cells saved by ending the group before each row: those behind it are padded less.
        saved = (ordered[0] - ordered) * np.arange(len(order), 0, -1) * page_tokens
        cut = int(saved.argmax())
        if saved[cut] < GROUP_CELLS or made == GROUPS_MAX:
            yield np.sort(order)
            return
        yield np.sort(order[:cut])
        order, made = order[cut:], made + 1


class Viewer:
    """Makes views of steps on one device."""

    def __init__(self, page_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._page = page_tokens
        self._dtype = dtype
        self._device = device

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array on the device; from pinned memory, so that nobody waits for the copy."""
        made = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return made
        return made.pin_memory().to(self._device, non_blocking=True)

    def view(self, layout: StepLayout, kind: Kind) -> View:
        """What the layers of one kind need of a step."""
        counts = np.diff(layout.starts)
        single = np.flatnonzero(counts == 1)
        several = np.flatnonzero(counts != 1)
        return View(
            list(self._decodes(layout, single, kind)) if len(single) else [],
            [self._chunk(layout, int(index), kind) for index in several],
        )

    def _decodes(self, layout: StepLayout, rows: NDArray[np.intp], kind: Kind) -> Iterator[Decodes]:
        first, last = pages_seen(layout.lengths[rows], kind.window, self._page)
        for part in groups((last - first).astype(np.intp), self._page):
            mine = rows[part]
            whole = len(mine) == len(layout.tokens)
            width = int((last[part] - first[part]).max())
            table = page_table(layout.tables[mine], first[part], last[part], width)
            yield Decodes(
                None if whole else self.tensor(layout.starts[mine].astype(np.int64)),
                len(mine),
                self.tensor(table.reshape(-1)),
                decode_mask(
                    self.tensor(layout.lengths[mine]),
                    self.tensor(first[part]),
                    width * self._page,
                    kind,
                    self._page,
                    self._dtype,
                ),
            )

    def _chunk(self, layout: StepLayout, index: int, kind: Kind) -> Chunk:
        start, end = int(layout.starts[index]), int(layout.starts[index + 1])
        length, count = int(layout.lengths[index]), end - start
        if count == length and not 0 < kind.window < length:
            return Chunk(start, end, None, None)
        if count == length:
            return Chunk(start, end, None, self._chunk_mask(0, 0, length, length, kind))
        before = length - count
        first = max(0, before + 1 - kind.window) // self._page if kind.window else 0
        last = -(-length // self._page)
        pages = self.tensor(layout.tables[index, first:last])
        cells = (last - first) * self._page
        mask = self._chunk_mask(before, first * self._page, count, cells, kind)
        return Chunk(start, end, pages, mask)

    def _chunk_mask(self, before: int, first: int, count: int, cells: int, kind: Kind) -> Any:
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        return causal_mask(before, first, count, cells, kind, like)


def causal_mask(before: int, first: int, count: int, cells: int, kind: Kind, like: Any) -> Any:
    """What is added to the scores of queries at ``before`` and on, keys at ``first`` and on.

    [count, cells], with the type and device of ``like``.
    """
    query = torch.arange(before, before + count, device=like.device)[:, None]
    key = torch.arange(first, first + cells, device=like.device)
    barred = key > query
    if kind.window:
        barred |= key <= query - kind.window
    mask = torch.zeros((count, cells), dtype=like.dtype, device=like.device)
    return mask.masked_fill_(barred, float("-inf"))


# The layers ---------------------------------------------------------------------------------------


class Step:
    """What all layers see of the step under way: where tokens go, and one view for each kind."""

    def __init__(self) -> None:
        self.cells: Any = None
        self.views: dict[Kind, View] = {}


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

    def attend(self, _module: Any, query: Any, key: Any, value: Any, given: Given) -> Any:
        """Attention for the tokens of the step; see ``attend``."""
        query, key, value = query[0], key[0], value[0]
        step, sinks = self._step, given.get("s_aux")
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
        query = rows.reshape(count, shape.kv_heads, -1, shape.key_dim)
        keys = self.keys.index_select(0, decodes.pages)
        values = self.values.index_select(0, decodes.pages)
        key = keys.view(count, -1, shape.kv_heads, shape.key_dim).transpose(1, 2)
        value = values.view(count, -1, shape.kv_heads, shape.value_dim).transpose(1, 2)
        if shape.kind.softcap or sinks is not None:
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


def attend_dense(query: Any, key: Any, value: Any, mask: Any, shape: Shape, sinks: Any) -> Any:
    """One sequence: [heads, tokens, dim]; without a mask, the causal one over equally many keys."""
    if shape.kind.softcap or sinks is not None:
        if mask is None:
            mask = causal_mask(0, 0, query.shape[1], query.shape[1], shape.kind, query)
        grouped = query.reshape(shape.kv_heads, -1, query.shape[1], shape.key_dim)
        sinks = None if sinks is None else sinks.view(shape.kv_heads, -1, 1, 1)
        out = attend_plainly(grouped, key[:, None], value[:, None], mask, shape, sinks)
        return out.reshape(shape.heads, -1, shape.value_dim)
    return scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=shape.scale,
        enable_gqa=shape.heads != shape.kv_heads,
    )[0]


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
