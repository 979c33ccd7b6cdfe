"""Attention over paged keys and values: the plain way of any device, and the kernel of the TPU.

The cache of a layer is [pages, 2 * kv_heads, page_tokens, head_dim] in the plain way, first the
heads of keys and then those of values: what it gathers are runs of memory, in the order in which
they are multiplied. The ragged paged attention kernel in JAX's own package takes [pages,
page_tokens, 2 * kv_heads, head_dim], keys at even places and values at odd ones. Both ways read the
same fields of a step, see ``jax_buckets.Bucket``.

The plain way never looks at more than a piece of each sequence at once. Its loops run as often as
the data says, and keep a running softmax (arXiv:2205.14135, section 3.1), so that one compiled
program serves any mix of lengths. Rows, the sequences that compute one token, go together. The
pages that all rows have in common are read once for all of them (arXiv:2402.05099). Longer runs of
a sequence's tokens go block by block.

In a wide bucket no loop depends on data: all rows look at all its pages, in one piece if that is
not too much to hold at once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from shards.engines import jax_native
from shards.engines.jax_buckets import BLOCK, OWN_PIECE, PIECE, Bucket
from shards.kv import TRASH

Step = Mapping[str, Array]
Carry = tuple[Array, Array, Array]

# Rows of a mixed step that are computed together: such steps may have few of them.
ROWS = 8
# Keys and values, in bytes, that the rows of a wide bucket gather at once.
GATHER_BYTES = 1 << 27
# Finite, so that no difference of two of them is undefined.
_MASKED = -1e30
# The kernel wants heads of a multiple of so many elements.
KERNEL_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class Attention:
    """How one layer attends. ``window`` as in ``LlamaConfig.windows``; ``kernel``: on a TPU.

    ``compute`` is the element type in which the plain way multiplies. ``native``: by a kernel of
    our own, with the plain way's cache (``jax_native``).
    """

    scale: float
    window: int
    kernel: bool
    compute: Any
    native: bool = False

    def attend(
        self, heads: tuple[Array, Array, Array], cache: Array, step: Step, bucket: Bucket
    ) -> tuple[Array, Array]:
        """Writes keys and values to the cache, and attends for all tokens of a step.

        ``heads`` are queries, keys and values [tokens, heads, head_dim]. Returns what the queries
        found, and the cache.
        """
        if self.native:
            return jax_native.attend(heads, cache, step, self)
        queries, keys, values = heads
        cache = self.write(cache, keys, values, step["cells"])
        return self(queries, cache, step, bucket), cache

    def __call__(self, queries: Array, cache: Array, step: Step, bucket: Bucket) -> Array:
        """Attends queries [tokens, heads, head_dim] to their own sequences; same shape out."""
        if self.kernel:
            return kernel(queries, cache, step, self)
        return plain(queries, cache, step, bucket, self)

    def write(self, cache: Array, keys: Array, values: Array, cells: Array) -> Array:
        """The cache with the keys and values [tokens, kv_heads, head_dim] in their cells."""
        return (kernel_write if self.kernel else write)(cache, keys, values, cells)

    def page_tokens(self, cache: Array) -> int:
        """Tokens of a page of the cache."""
        return int(cache.shape[1 if self.kernel else 2])


def write(cache: Array, keys: Array, values: Array, cells: Array) -> Array:
    """The plain way's cache with keys and values [tokens, kv_heads, head_dim] in their cells."""
    tokens, heads, dim = keys.shape
    page_tokens = cache.shape[2]
    pairs = _stored(jnp.concatenate((keys, values), axis=1), cache.dtype)
    if tokens == 1:
        # A scatter of one becomes a choice between two whole caches, and this is done twice, with
        # copies, if it is not in the shape that the program returns.
        place = (cells[0] // page_tokens, 0, cells[0] % page_tokens, 0)
        return lax.dynamic_update_slice(cache, pairs.reshape(1, 2 * heads, 1, dim), place)
    places = cache.at[cells // page_tokens, :, cells % page_tokens]
    return places.set(pairs, mode="promise_in_bounds")


def _stored(values: Array, dtype: Any) -> Array:
    """Keys or values as they are in the cache: uint16 has the bits of bfloat16.

    XLA's CPU client has no scatter of bfloat16: it would convert the whole cache to float32 and
    back, for each layer and step.
    """
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(dtype)


def _loaded(stored: Array, dtype: Any) -> Array:
    """The inverse of ``_stored``."""
    if stored.dtype == jnp.uint16:
        stored = lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return stored.astype(dtype)


# The kernel ------------------------------------------------------------------------------------


def kernel_write(cache: Array, keys: Array, values: Array, cells: Array) -> Array:
    """As ``write``, of the kernel's cache, whose heads may be longer."""
    tokens, heads, dim = keys.shape
    pages, page_tokens, both, cache_dim = cache.shape
    pairs = jnp.stack((keys, values), axis=2).astype(cache.dtype).reshape(tokens, 2 * heads, dim)
    pairs = jnp.pad(pairs, ((0, 0), (0, 0), (0, cache_dim - dim)))
    flat = cache.reshape(pages * page_tokens, both, cache_dim)
    return flat.at[cells].set(pairs, mode="promise_in_bounds").reshape(cache.shape)


def kernel(
    queries: Array, cache: Array, step: Step, attention: Attention, function: Any = None
) -> Array:
    """The kernel of ``jax.experimental.pallas.ops.tpu``, or a function with its arguments."""
    if function is None:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        function = ragged_paged_attention
    tokens, _, dim = queries.shape
    out = function(
        jnp.pad(queries, ((0, 0), (0, 0), (0, cache.shape[-1] - dim))),
        cache,
        step["lengths"],
        step["tables"],
        step["starts"],
        step["counts"][3:4],
        sm_scale=attention.scale,
        sliding_window=attention.window or None,
    )
    # What it leaves in the rows of padding is not defined, and must not reach the cache.
    real = jnp.arange(tokens) < step["starts"][-1]
    return jnp.where(real[:, None, None], out[..., :dim], 0)


# The plain way ---------------------------------------------------------------------------------


def plain(queries: Array, cache: Array, step: Step, bucket: Bucket, attention: Attention) -> Array:
    """Gathered pages and a masked softmax, a piece at a time."""
    tokens, heads, dim = queries.shape
    groups = cache.shape[1] // 2
    grouped = (queries.astype(jnp.float32) * attention.scale).astype(attention.compute)
    grouped = grouped.reshape(tokens, groups, heads // groups, dim)
    if bucket.mixed:
        out = _mixed(grouped, cache, step, bucket, attention)
    elif bucket.wide:
        out = _wide(grouped, cache, step, attention)
    else:
        out = _rows(grouped, cache, step, jnp.int32(0), attention)
    return out.reshape(queries.shape).astype(queries.dtype)


def _mixed(queries: Array, cache: Array, step: Step, bucket: Bucket, attention: Attention) -> Array:
    """Rows first, in groups; then the blocks, each written over what padding left behind it."""
    spare = max(BLOCK, ROWS)
    padded = jnp.pad(queries, ((0, spare), (0, 0), (0, 0), (0, 0)))
    rows = min(ROWS, bucket.sequences)
    row_groups = -(-step["counts"][0] // rows)

    def some_rows(index: Array, out: Array) -> Array:
        # The last group may begin earlier, and compute some rows again: tables have no spare rows.
        first = jnp.minimum(index * rows, bucket.sequences - rows)
        part = lax.dynamic_slice_in_dim(padded, first, rows)
        done = _rows(part, cache, step, first, attention)
        return lax.dynamic_update_slice_in_dim(out, done, first, axis=0)

    def one_block(index: Array, out: Array) -> Array:
        sequence, first, count = step["blocks"][index]
        part = lax.dynamic_slice_in_dim(padded, first, BLOCK)
        done = _block(part, cache, step, (sequence, first, count), attention)
        before = lax.dynamic_slice_in_dim(out, first, BLOCK)
        real = jnp.arange(BLOCK) < count
        done = jnp.where(real[:, None, None, None], done, before)
        return lax.dynamic_update_slice_in_dim(out, done, first, axis=0)

    out = jnp.zeros(padded.shape, jnp.float32)
    out = lax.fori_loop(0, row_groups, some_rows, out)
    out = lax.fori_loop(0, step["counts"][1], one_block, out)
    return out[: queries.shape[0]]


def _rows(queries: Array, cache: Array, step: Step, first: Array, attention: Attention) -> Array:
    """Attention of sequences ``first`` and on, one token each: [rows, groups, heads, head_dim]."""
    rows = queries.shape[0]
    page_tokens = cache.shape[2]
    tables = lax.dynamic_slice_in_dim(step["tables"], first, rows)
    positions = lax.dynamic_slice_in_dim(step["lengths"], first, rows) - 1
    common = step["counts"][2]
    real = first + jnp.arange(rows) < step["counts"][0]
    lowest = jnp.min(jnp.where(real, positions, jnp.iinfo(jnp.int32).max))
    cut = _first_seen(lowest, attention)
    before = common * page_tokens
    reach = (cut, before - 1)
    carry = _together(queries, cache, (step["tables"][0], positions, reach), attention)
    size = OWN_PIECE * page_tokens

    def own(index: Array, carry: Carry) -> Carry:
        page = common + index * OWN_PIECE
        pages = lax.dynamic_slice_in_dim(tables, page, OWN_PIECE, axis=1)
        return _own(carry, queries, cache, (page, pages, positions), attention)

    behind = jnp.maximum(cut - before, 0) // size
    highest = jnp.max(jnp.where(real, positions, 0))
    end = -(-(highest + 1 - before) // size)
    return _finish(lax.fori_loop(behind, end, own, carry))


def _together(
    queries: Array,
    cache: Array,
    where: tuple[Array, Array, tuple[Array, Array]],
    attention: Attention,
) -> Carry:
    """What queries [tokens, groups, heads, head_dim] see of the pages of one table.

    ``where`` is the table, the positions of the tokens, and the first and the last place that is
    looked at. All queries of a group are one matrix.
    """
    table, positions, (first, last) = where
    tokens, groups, heads, dim = queries.shape
    size = PIECE * cache.shape[2]
    rows = queries.swapaxes(0, 1).reshape(groups, tokens * heads, dim)
    positions = jnp.repeat(positions, heads)[:, None]

    def piece(index: Array, carry: Carry) -> Carry:
        pages = lax.dynamic_slice_in_dim(table, index * PIECE, PIECE)
        keys, values = _load(cache, pages, attention)
        at = index * size + jnp.arange(size)
        values = jnp.where((at <= last)[:, None], values, 0)
        seen = _seen(at[None], positions, attention) & (at <= last)[None]
        scores = jnp.where(seen, _dot("gqd,gkd->gqk", rows, keys), _MASKED)
        return _fold(carry, scores, values, "gqk,gkd->gqd")

    found = lax.fori_loop(first // size, -(-(last + 1) // size), piece, _nothing(rows))
    by_token = (one.reshape(groups, tokens, heads, *one.shape[2:]) for one in found)
    peak, total, sums = (one.swapaxes(0, 1) for one in by_token)
    return peak, total, sums


def _wide(queries: Array, cache: Array, step: Step, attention: Attention) -> Array:
    """Attention of all rows to all pages of the tables, in pieces whose number is no data."""
    tables, positions = step["tables"], step["lengths"] - 1
    rows, pages = tables.shape
    element = jnp.dtype(attention.compute).itemsize
    whole = rows * pages * math.prod(cache.shape[1:]) * element
    pieces = -(-whole // GATHER_BYTES)
    size = -(-pages // pieces)
    pieces = -(-pages // size)
    tables = jnp.pad(tables, ((0, 0), (0, pieces * size - pages)), constant_values=TRASH)

    def piece(index: Any, carry: Carry) -> Carry:
        page = index * size
        found = lax.dynamic_slice_in_dim(tables, page, size, axis=1)
        return _own(carry, queries, cache, (page, found, positions), attention)

    if pieces == 1:
        return _finish(piece(0, _nothing(queries)))
    return _finish(lax.fori_loop(0, pieces, piece, _nothing(queries)))


def _own(
    carry: Carry,
    queries: Array,
    cache: Array,
    where: tuple[Any, Array, Array],
    attention: Attention,
) -> Carry:
    """Takes in pages [rows, count] of each row's own table, the first of which is its ``page``-th.

    ``where`` is that number, the pages, and the positions of the rows.
    """
    page, pages, positions = where
    page_tokens = cache.shape[2]
    keys, values = _load(cache, pages, attention)
    at = page * page_tokens + jnp.arange(pages.shape[1] * page_tokens)
    written = at[None] <= positions[:, None]
    values = jnp.where(written[:, None, :, None], values, 0)
    scores = _dot("sgrd,sgkd->sgrk", queries, keys)
    seen = _seen(at[None], positions[:, None], attention)
    scores = jnp.where(seen[:, None, None], scores, _MASKED)
    return _fold(carry, scores, values, "sgrk,sgkd->sgrd")


def _block(
    queries: Array,
    cache: Array,
    step: Step,
    block: tuple[Array, Array, Array],
    attention: Attention,
) -> Array:
    """Attention of up to ``BLOCK`` tokens of one sequence: [BLOCK, groups, heads, head_dim]."""
    sequence, first, count = block
    start = step["positions"][first]
    reach = (_first_seen(start, attention), start + count - 1)
    where = (step["tables"][sequence], start + jnp.arange(BLOCK), reach)
    return _finish(_together(queries, cache, where, attention))


def _load(cache: Array, pages: Array, attention: Attention) -> tuple[Array, Array]:
    """Keys and values of pages [..., count]: [..., groups, count * page_tokens, head_dim].

    A head's tokens of a page are gathered as one row, which XLA's CPU client copies as such: of
    rows with more dimensions it computes where each element is.
    """
    count, both, page_tokens, dim = cache.shape
    rows = cache.reshape(count * both, page_tokens * dim)
    first = pages[..., None, :] * both + jnp.arange(both // 2, dtype=jnp.int32)[:, None]
    shape = (*first.shape[:-1], first.shape[-1] * page_tokens, dim)
    keys, values = (
        _loaded(rows.at[first + heads].get(mode="promise_in_bounds"), attention.compute)
        for heads in (0, both // 2)
    )
    return keys.reshape(shape), values.reshape(shape)


def _seen(at: Array, positions: Array, attention: Attention) -> Array:
    """Which places a token looks at: itself and those before it, within its window."""
    seen = at <= positions
    return seen & (at > positions - attention.window) if attention.window else seen


def _first_seen(position: Array, attention: Attention) -> Array:
    """The first place that the token at that position looks at."""
    if not attention.window:
        return jnp.int32(0)
    return jnp.maximum(position - attention.window + 1, 0)


def _dot(what: str, left: Array, right: Array) -> Array:
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(what, left, right, precision=precision, preferred_element_type=jnp.float32)


def _nothing(queries: Array) -> Carry:
    """Highest score, sum of weights, weighted sum of values: before anything was seen."""
    shape = queries.shape[:-1]
    return jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(queries.shape, jnp.float32)


def _fold(carry: Carry, scores: Array, values: Array, what: str) -> Carry:
    """Takes a piece in. A piece of masked scores alone is undone by the first that has others."""
    peak, total, sums = carry
    higher = jnp.maximum(peak, scores.max(axis=-1))
    weights = jnp.exp(scores - higher[..., None])
    kept = jnp.exp(peak - higher)
    total = total * kept + weights.sum(axis=-1)
    sums = sums * kept[..., None] + _dot(what, weights.astype(values.dtype), values)
    return higher, total, sums


def _finish(carry: Carry) -> Array:
    _, total, sums = carry
    return sums / total[..., None]
