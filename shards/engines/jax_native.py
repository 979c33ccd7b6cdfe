"""Kernels of our own for the layers of JAX on CPUs that multiply bfloat16 numbers (AVX512-BF16).

XLA's CPU client brings the weights of each product into the order in which it multiplies, at each
call: most of the work of a step of few rows. Here they are packed once, when they are loaded, and
kept in no other form. The kernels (``jax_native.cpp``) are custom calls of the programs: products,
the two halves of a gated layer, and attention straight from the pages. They compute on the threads
of XLA's pool, and leave out the rows that are padding.

A packed weight [outs, in] is [blocks, in / 2, 64, 2]: blocks of 64 outputs, the last one filled up
with zeros. Of ranks each packs its own part, so the weight is cut along blocks or along inputs.
"""

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

from shards.engines.native_build import HERE, Kernels

if TYPE_CHECKING:
    from shards.engines.jax_attention import Attention

SOURCE = HERE / "jax_native.cpp"
BLOCK = 64
# A weight whose last block would be mostly padding stays plain.
_PADDED_MAX = 1.15
# What attention takes: heads of so many elements, and how many of them share keys at most.
_HEAD_DIM, _HEAD_DIM_MAX, _GROUP_MAX = 64, 256, 64
_PAGE_TOKENS = 16
# Norms are over a multiple of so many numbers.
_LANES = 16
_KERNELS = (
    *("product_f32", "product_bf16", "added_bf16"),
    *("norm_bf16", "gated_bf16", "attend_bf16"),
)


@cache
def register() -> None:
    """Tells XLA of the kernels, compiled if need be. Raises ``BuildError``."""
    flags = ("-pthread", f"-I{jax.ffi.include_dir()}")
    library = Kernels("jax", SOURCE, flags, versions=(jaxlib.__version__,)).library()
    for name in _KERNELS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")


def processor_multiplies() -> bool:
    """Whether the kernels are for this processor: AMX, which they do not use, is faster."""
    flags = processor_flags().split()
    return "avx512_bf16" in flags and "avx512dq" in flags and "amx_bf16" not in flags


def processor_flags() -> str:
    """What the processor can do, in the kernel's words, or else its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return platform.processor()


# Weights ---------------------------------------------------------------------------------------


def packs(outs: int, width: int) -> bool:
    """Whether a weight [outs, width] is worth packing."""
    return width % 2 == 0 and blocks(outs) * BLOCK <= _PADDED_MAX * outs


def gates(inner: int) -> bool:
    """Whether gate and up, each of so many outputs, are multiplied by ``gated``."""
    return inner % BLOCK == 0


def blocks(outs: int) -> int:
    """Of how many blocks a packed weight is."""
    return -(-outs // BLOCK)


def pack(weight: Any) -> Any:
    """A weight [outs, in] of numpy, packed; see the module."""
    outs, width = weight.shape
    filled = np.pad(weight.view(np.uint16), ((0, blocks(outs) * BLOCK - outs), (0, 0)))
    paired = filled.reshape(-1, BLOCK, width // 2, 2).swapaxes(1, 2)
    return np.ascontiguousarray(paired).view(weight.dtype)


def interleave(weight: Any) -> Any:
    """Gate and up [2 * inner, in] of numpy, as ``gated`` wants them packed: blocks in turns."""
    turns = weight.reshape(2, -1, BLOCK, weight.shape[1]).swapaxes(0, 1)
    return turns.reshape(weight.shape)


def rows(table: Array, places: Array) -> Array:
    """Rows [count, in] of a packed weight."""
    found = table[places // BLOCK, :, places % BLOCK]
    return found.reshape(len(places), -1)


# Computation -----------------------------------------------------------------------------------


def product(x: Array, weight: Array, real: Array, outs: int, dtype: Any) -> Array:
    """Rows [count, in] by a packed weight, as ``dtype``; those from ``real`` [1] on are 0."""
    name = "product_f32" if dtype == jnp.float32 else "product_bf16"
    return _called(name, jax.ShapeDtypeStruct((len(x), outs), dtype))(x, weight, real)


def added(x: Array, weight: Array, real: Array, rest: Array) -> Array:
    """``rest`` [rows, outs] plus a ``product``, which is rounded first, as bfloat16."""
    return _called("added_bf16", jax.ShapeDtypeStruct(rest.shape, rest.dtype))(
        x, weight, real, rest
    )


def norms(width: int) -> bool:
    """Whether there is ``norm`` for rows of so many numbers."""
    return width % _LANES == 0


def norm(x: Array, weight: Array, real: Array, epsilon: float) -> Array:
    """RMS norm of x [rows, width] as bfloat16; see ``product``."""
    call = _called("norm_bf16", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, real, epsilon=np.float32(epsilon))


def gated(x: Array, weight: Array, real: Array) -> Array:
    """silu(gate) * up of x [rows, in] as bfloat16; see ``product`` and ``interleave``."""
    inner = weight.shape[0] * BLOCK // 2
    return _called("gated_bf16", jax.ShapeDtypeStruct((len(x), inner), x.dtype))(x, weight, real)


def attends(heads: int, kv_heads: int, head_dim: int, page_tokens: int) -> bool:
    """Whether there is attention for such a layer."""
    return (
        head_dim % _HEAD_DIM == 0
        and head_dim <= _HEAD_DIM_MAX
        and heads // kv_heads <= _GROUP_MAX
        and page_tokens % _PAGE_TOKENS == 0
    )


def attend(
    heads: tuple[Array, Array, Array],
    cache: Array,
    step: Mapping[str, Array],
    attention: "Attention",
) -> tuple[Array, Array]:
    """As ``jax_attention.Attention.attend``, of the plain way's cache, whatever the bucket."""
    queries = heads[0]
    out = (
        jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    )
    names = ("cells", "starts", "lengths", "tables", "counts")
    given = (*heads, cache, *(step[name] for name in names))
    call = _called("attend_bf16", out, input_output_aliases={3: 1})
    attended, cache = call(
        *given, scale=np.float32(attention.scale), window=np.int64(attention.window)
    )
    return attended, cache


def _called(name: str, out: Any, **more: Any) -> Any:
    return jax.ffi.ffi_call(_target(name), out, **more)


def _target(name: str) -> str:
    return f"roundhouse_{name}"
