"""Whether there are native kernels, and they compute what numpy does: tried at load."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shards.engines import jax_native
from shards.engines.base import ModelError
from shards.engines.jax_attention import Attention
from shards.engines.jax_buckets import choose as choose_buckets
from shards.engines.jax_buckets import ordered, pack
from shards.engines.native_build import BuildError
from shards.engines.native_trial import trial_step
from shards.kv import StepLayout

_BFLOAT16 = np.dtype(jnp.bfloat16)
# Rows, of which the last one is padding; inputs; outputs, a part of which is in no whole block; and
# those of a gated layer.
_ROWS, _WIDTH, _OUTS, _INNER = 5, 80, 188, 128
_EPSILON = 1e-5
# Results are rounded to 8 bits, and so are the weights of attention.
_TOLERANCE = 0.03
_UNUSED = "kernels of our own, about twice as fast, are not used"


def choose(wanted: str, *, able: bool) -> tuple[bool, str]:
    """Whether there are kernels, and else what to warn of; ``wanted``: ``on``, ``off``, ``auto``.

    ``able``: whether this device has bfloat16 weights that they could multiply. Raises
    ``ModelError`` where they are wanted and cannot be.
    """
    able = able and jax_native.processor_multiplies()
    if wanted == "on" and not able:
        raise ModelError(
            "jax: engine option native=on: the kernels are for bfloat16 weights on CPUs with"
            " AVX512-BF16 and without AMX; leave it out"
        )
    if wanted == "off" or not able:
        return False, ""
    try:
        jax_native.register()
    except BuildError as error:
        if wanted == "on":
            raise ModelError(f"jax: engine option native=on: {error}; leave it out") from error
        return False, f"{_UNUSED}: {error}"
    if not multiplies():
        return False, f"{_UNUSED}: they do not compute what numpy does"
    return True, ""


@cache
def multiplies() -> bool:
    """Whether the products are those of numpy, up to rounding, and leave out what is padding."""
    numbers = np.random.default_rng(0)
    x, weight, halves = (
        (numbers.standard_normal(shape, np.float32) / 8).astype(_BFLOAT16)
        for shape in ((_ROWS, _WIDTH), (_OUTS, _WIDTH), (2 * _INNER, _WIDTH))
    )
    real = np.array([_ROWS - 1], np.int32)

    def computed(x: Any, weight: Any, order: Any, real: Any) -> tuple[Any, ...]:
        single = jax_native.product(x, weight, real, _OUTS, jnp.float32)
        return (
            single,
            jax_native.product(x, weight, real, _OUTS, jnp.bfloat16),
            jax_native.added(x, weight, real, single.astype(jnp.bfloat16)) / 2,
            jax_native.gated(x, order, real),
            jax_native.norm(x, x[0], real, _EPSILON),
        )

    packed = jax_native.pack(weight), jax_native.pack(jax_native.interleave(halves))
    *products, gated, norm = jax.jit(computed)(x, *packed, real)
    expected = _wide(x) @ _wide(weight).T
    gate, up = np.split(_wide(x) @ _wide(halves).T, 2, axis=1)
    size = np.sqrt(np.square(_wide(x)).mean(axis=1, keepdims=True) + _EPSILON)
    pairs = [
        *((seen, expected) for seen in products),
        (gated, gate / (1 + np.exp(-gate)) * up),
        (norm, _wide(x) / size * _wide(x)[0]),
    ]
    return all(
        np.allclose(_wide(seen)[:-1], right[:-1], rtol=_TOLERANCE, atol=_TOLERANCE)
        and not _wide(seen)[-1].any()
        for seen, right in pairs
    )


def attends(attention: Attention, heads: int, kv_heads: int, head_dim: int, page: int) -> bool:
    """Whether the kernel has attention for such layers, of ``page`` tokens, and it is numpy's."""
    if not jax_native.attends(heads, kv_heads, head_dim, page):
        return False
    layout = trial_step(page)
    sizes = (len(layout.lengths), len(layout.tokens), layout.tables.shape[1])
    bucket = choose_buckets(*sizes).fit(layout)
    layout = ordered(layout, bucket)
    vector = pack(layout, bucket)
    step = {name: vector[span].reshape(shape) for name, span, shape in bucket.spans()}
    numbers = np.random.default_rng(0)
    cache, *three = (
        numbers.standard_normal(shape, np.float32).astype(_BFLOAT16)
        for shape in (
            (int(layout.tables.max()) + 1, 2 * kv_heads, page, head_dim),
            *((bucket.tokens, count, head_dim) for count in (heads, kv_heads, kv_heads)),
        )
    )
    queries, keys, values = three

    def attended(cache: Any, step: Any) -> Any:
        return jax_native.attend((queries, keys, values), cache, step, attention)

    seen, written = jax.jit(attended)(cache.view(np.uint16), step)
    expected = _expected(layout, np.asarray(written).view(_BFLOAT16), queries, attention)
    found = _wide(seen)[: len(layout.tokens)]
    return bool(np.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))


def _expected(layout: StepLayout, cache: Any, queries: Any, attention: Attention) -> Any:
    """Attention of all tokens, in single precision, once the cache has their keys and values."""
    kv_heads = cache.shape[1] // 2
    group = queries.shape[1] // kv_heads
    found = []
    for row, length in enumerate(layout.lengths.tolist()):
        pages = _wide(cache[layout.tables[row]]).swapaxes(0, 1)
        lines = pages.reshape(2 * kv_heads, -1, pages.shape[-1])[:, :length]
        keys, values = (np.repeat(half, group, axis=0) for half in np.split(lines, 2))
        places = np.arange(layout.starts[row], layout.starts[row + 1])
        mine = _wide(queries[places]).swapaxes(0, 1) * attention.scale
        back = layout.positions[places][:, None] - np.arange(length)
        seen = (back >= 0) & (back < (attention.window or length + 1))
        weights = np.where(seen, np.exp(mine @ keys.swapaxes(1, 2)), 0)
        out = weights @ values / weights.sum(axis=-1, keepdims=True)
        found.append(out.swapaxes(0, 1))
    return np.concatenate(found)


def _wide(numbers: Any) -> Any:
    return np.asarray(numbers).astype(np.float32)
