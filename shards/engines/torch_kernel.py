"""Attention of decoding sequences straight from their pages: a Triton kernel for GPUs.

Elsewhere pages are gathered side by side first (``torch_attention``), which reads and writes the
keys and values once more than attention itself does, and at the length of the longest sequence. The
kernel follows each sequence's table, and reads what the sequence has.

A program computes one KV head of one sequence with all query heads that share it. Where there are
fewer programs than the GPU has room for, each sequence is cut into several parts, which a second
kernel weighs by their sums of exponents (flash-decoding; arXiv:2205.14135 for the running softmax).
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from shards.engines.torch_attention import Shape
    from shards.engines.torch_views import Decodes

# Cells of one pass of the loop, and the fewest that are worth a part of their own.
_BLOCK = 64
_PART_MIN = 256
_PARTS_MAX = 32
# Parts for which each multiprocessor should have work; two hide each other's waiting for memory.
_PER_PROCESSOR = 2
# The least number of rows that a matrix unit multiplies.
_ROWS_MIN = 16
# Finite, so that no difference of two of them is undefined.
_MASKED = tl.constexpr(-1e30)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # noqa: PLR0913, PLR0917 - a kernel takes its pointers, numbers and sizes one by one
    query: "Any",
    keys: "Any",
    values: "Any",
    table: "Any",
    begins: "Any",
    lengths: "Any",
    sinks: "Any",
    out: "Any",
    sums: "Any",
    width: "Any",
    parts: "Any",
    window: "Any",
    scale: "Any",
    softcap: "Any",
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    padded: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
    sinking: tl.constexpr,
) -> None:
    """One part of one KV head of one sequence; see ``PagedKernel``."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, begin = tl.load(lengths + row).to(tl.int32), tl.load(begins + row).to(tl.int32)
    cells = length - begin
    first = tl.maximum(length - window, 0) - begin if windowed else 0
    each = tl.cdiv(tl.cdiv(cells, parts), block) * block
    start, end = part * each, tl.minimum(part * each + each, cells)

    member, at = tl.arange(0, padded), tl.arange(0, key_block)
    real = member < group
    heads = row * kv_heads * group + head * group + member  # counted over all sequences
    mine = real[:, None] & (at < key_dim)[None, :]
    q = tl.load(query + heads[:, None] * key_dim + at[None, :], mask=mine, other=0.0)
    peak, total = tl.full((padded,), _MASKED, tl.float32), tl.zeros((padded,), tl.float32)
    if sinking:  # noqa: SIM102 - known when compiled, the other is not
        if part == 0:
            peak = tl.load(sinks + head * group + member, mask=real, other=0.0).to(tl.float32)
            total = tl.full((padded,), 1.0, tl.float32)
    # fmt: off
    found, peak, total = _fold(
        q, keys, values, table + row * width, head, start, end, first, peak, total, scale, softcap,
        kv_heads, key_dim, value_dim, page_tokens, padded, key_block, value_block, block, capped,
    )
    # fmt: on
    slot, at = heads * parts + part, tl.arange(0, value_block)
    mine = real[:, None] & (at < value_dim)[None, :]
    # A part without a cell has no weight, and must not divide by that.
    weight = tl.where(total == 0.0, 1.0, total)
    found = (found / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + slot[:, None] * value_dim + at[None, :], found, mask=mine)
    tl.store(sums + slot, tl.where(total == 0.0, _MASKED, peak + tl.log(weight)), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _fold(  # noqa: PLR0913, PLR0917
    q: "Any",
    keys: "Any",
    values: "Any",
    table: "Any",
    head: "Any",
    start: "Any",
    end: "Any",
    first: "Any",
    peak: "Any",
    total: "Any",
    scale: "Any",
    softcap: "Any",
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    padded: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    block: tl.constexpr,
    capped: tl.constexpr,
) -> "Any":
    """Weighted sum of values of cells ``start`` to ``end``; highest score; sum of weights."""
    key_at, value_at = tl.arange(0, key_block), tl.arange(0, value_block)
    found = tl.zeros((padded, value_block), tl.float32)
    for at in range(start, end, block):
        cell = at + tl.arange(0, block)
        seen = (cell < end) & (cell >= first)
        page = tl.load(table + cell // page_tokens, mask=seen, other=0).to(tl.int64)
        held = ((page * page_tokens + cell % page_tokens) * kv_heads + head)[:, None]
        there = seen[:, None] & (key_at < key_dim)[None, :]
        k = tl.load(keys + held * key_dim + key_at[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if capped:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, _MASKED)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(peak - higher)
        there = seen[:, None] & (value_at < value_dim)[None, :]
        v = tl.load(values + held * value_dim + value_at[None, :], mask=there, other=0.0)
        found = found * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weights, axis=1)
        peak = higher
    return found, peak, total


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # noqa: PLR0917
    parted: "Any",
    sums: "Any",
    out: "Any",
    parts: "Any",
    value_dim: tl.constexpr,
    value_block: tl.constexpr,
    parts_most: tl.constexpr,
) -> None:
    """Weighs the parts of one head of one sequence by their sums of exponents."""
    slot = tl.program_id(0)
    part, at = tl.arange(0, parts_most), tl.arange(0, value_block)
    there = part < parts
    exponents = tl.load(sums + slot * parts + part, mask=there, other=_MASKED)
    weights = tl.where(there, tl.exp(exponents - tl.max(exponents, axis=0)), 0.0)
    mine = there[:, None] & (at < value_dim)[None, :]
    place = parted + (slot * parts + part)[:, None] * value_dim + at[None, :]
    found = tl.sum(tl.load(place, mask=mine, other=0.0) * weights[:, None], axis=0)
    found = found / tl.sum(weights, axis=0)
    tl.store(out + slot * value_dim + at, found.to(out.dtype.element_ty), mask=at < value_dim)


@triton.jit(  # type: ignore[untyped-decorator]
    # Else there would be variants for even and odd numbers of tokens, compiled while serving.
    do_not_specialize=["key_token", "key_head", "value_token", "value_head"]
)
def _write(  # noqa: PLR0913, PLR0917
    key: "Any",
    value: "Any",
    cells: "Any",
    keys: "Any",
    values: "Any",
    key_token: "Any",
    key_head: "Any",
    value_token: "Any",
    value_head: "Any",
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
) -> None:
    """Key and value of one KV head of one token; see ``PagedKernel.write``."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(cells + token).to(tl.int64) * kv_heads + head
    at = tl.arange(0, key_block)
    found = tl.load(key + token * key_token + head * key_head + at, mask=at < key_dim)
    tl.store(keys + slot * key_dim + at, found, mask=at < key_dim)
    at = tl.arange(0, value_block)
    found = tl.load(value + token * value_token + head * value_head + at, mask=at < value_dim)
    tl.store(values + slot * value_dim + at, found, mask=at < value_dim)


class PagedKernel:
    """The kernels, for one device. Callable from inside of a graph's capture."""

    def __init__(self, device: torch.device) -> None:
        processors = 1
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = processors * _PER_PROCESSOR

    def parts(self, programs: int, cells: int) -> int:
        """Into how many parts sequences of up to so many cells are cut: a power of two."""
        most = min(_PARTS_MAX, -(-cells // _PART_MIN))
        parts = 1
        while parts * 2 <= most and parts * programs < self._programs:
            parts *= 2
        return parts

    def write(self, key: Any, value: Any, cells: Any, keys: Any, values: Any) -> None:
        """Writes ``key`` and ``value``, [kv_heads, tokens, dim], to their cells [tokens].

        ``keys`` and ``values`` are whole caches, as in a call.
        """
        key, value = (one if one.stride(2) == 1 else one.contiguous() for one in (key, value))
        kv_heads, tokens, key_dim = key.shape
        value_dim = value.shape[2]
        _write[tokens, kv_heads](
            key,
            value,
            cells,
            keys,
            values,
            key.stride(1),
            key.stride(0),
            value.stride(1),
            value.stride(0),
            kv_heads,
            key_dim,
            value_dim,
            triton.next_power_of_2(key_dim),
            triton.next_power_of_2(value_dim),
            num_warps=1,
        )

    def __call__(
        self, query: Any, keys: Any, values: Any, decodes: "Decodes", shape: "Shape", sinks: Any
    ) -> Any:
        """Attention of ``query`` [sequences, heads, key_dim]; [sequences, heads, value_dim].

        ``keys`` and ``values`` are whole caches, [pages, page_tokens, kv_heads, dim].
        """
        count, page = decodes.count, keys.shape[1]
        width = decodes.pages.numel() // count
        parts = self.parts(count * shape.kv_heads, width * page)
        group = shape.heads // shape.kv_heads
        value_block = triton.next_power_of_2(shape.value_dim)
        out = query.new_empty((count, shape.heads, shape.value_dim))
        size = (count, shape.heads, parts)
        sums = torch.empty(size, dtype=torch.float32, device=query.device)
        parted = out if parts == 1 else sums.new_empty((*size, shape.value_dim))
        _attend[count, shape.kv_heads, parts](
            query.contiguous(),
            keys,
            values,
            decodes.pages,
            decodes.begins,
            decodes.lengths,
            sums if sinks is None else sinks,
            parted,
            sums,
            width,
            parts,
            shape.kind.window,
            shape.scale,
            shape.kind.softcap,
            shape.kv_heads,
            group,
            shape.key_dim,
            shape.value_dim,
            page,
            max(_ROWS_MIN, triton.next_power_of_2(group)),
            max(_ROWS_MIN, triton.next_power_of_2(shape.key_dim)),
            max(_ROWS_MIN, value_block),
            _BLOCK,
            shape.kind.window > 0,
            shape.kind.softcap > 0,
            sinks is not None,
        )
        if parts > 1:
            slots = count * shape.heads
            _merge[slots,](parted, sums, out, parts, shape.value_dim, value_block, _PARTS_MAX)
        return out
