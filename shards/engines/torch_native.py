"""Kernels of our own for a decoder layer on CPUs that multiply bfloat16 numbers (AVX512-BF16).

A step of a small model is hundreds of operations, each of which takes torch microseconds to begin,
and the parts that take longer are not made for it: products of few rows wait for the memory that
their weights are in, and attention wants keys and values of all sequences side by side. These
kernels (``torch_native.cpp``) read the pages where they are, and fetch the next weights while they
multiply. They round where the library's own code rounds.

All are for bfloat16 tensors on the CPU, and compute on the calling thread with as many threads as
torch has there.
"""

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from ctypes import byref, c_float, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from shards.engines.native_build import HERE, BuildError, Kernels
from shards.engines.omp_cores import openmp_path
from shards.kv import Ints, StepLayout

if TYPE_CHECKING:
    from shards.engines.torch_attention import Shape

# What the kernels take: numbers of a register, and bounds of their scratch memory.
LANES = 16
_KEY_DIM, _VALUE_DIM, _DIM_MAX = 32, 64, 256
_GROUP_MAX = 64


SOURCE = HERE / "torch_native.cpp"


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("cells", "starts", "lengths", "tables")),
        *((name, c_int64) for name in ("tokens", "sequences", "table_width")),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("at", c_void_p),
        *((name, c_int64) for name in ("page_step", "token_step", "head_step")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Cache) for name in ("keys", "values")),
        *((name, c_int64) for name in ("heads", "kv_heads", "key_dim", "value_dim")),
        *((name, c_int64) for name in ("page_tokens", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
    )


class _Heads(ctypes.Structure):
    _fields_ = (("at", c_void_p), ("token_step", c_int64), ("head_step", c_int64))


class Cache:
    """The cache of one layer, as the kernel sees it: [pages, page_tokens, kv_heads, dim]."""

    def __init__(self, shape: "Shape", keys: Any, values: Any) -> None:
        self.keys, self.values = keys, values
        self.heads, self.value_dim = shape.heads, shape.value_dim
        kind = shape.kind
        sizes = (shape.heads, shape.kv_heads, shape.key_dim, shape.value_dim)
        more = (keys.shape[1], kind.window, shape.scale, kind.softcap)
        caches = (_Cache(cache.data_ptr(), *cache.stride()[:3]) for cache in (keys, values))
        self.seen = _Layer(*caches, *sizes, *more)


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises ``BuildError``.

    They are linked to torch's own OpenMP, as a second one would have threads of its own.
    """
    openmp = openmp_path()
    if openmp is None:
        raise BuildError("torch's OpenMP library is not found")
    return Kernels("torch", SOURCE, flags=("-fopenmp",), linked=(str(openmp),)).library()


class Native:
    """The kernels. Raises ``BuildError`` where they cannot be had."""

    def __init__(self) -> None:
        self._library = library()
        self._product = self._kernel("product", 4 * [c_void_p] + 3 * [c_int64])
        self._norm = self._kernel("norm", [*3 * [c_void_p], c_int64, c_int64, c_float])
        self._gated = self._kernel("gated", [c_void_p, c_void_p, c_int64, c_int64])
        self._rotate = self._kernel("rotate", 6 * [c_void_p] + 4 * [c_int64])
        self._attend = self._kernel("attend", 7 * [c_void_p])
        self._step = _Step()
        self._held: Sequence[Ints] = ()
        self._undo = ExitStack()

    def replace_in(self, module: dict[str, Any], name: str, value: Any) -> None:
        """Puts a function into a file of the library, whose names are ``module``, until ``close``.

        Other models of the process would meet it there, too.
        """
        self._undo.callback(module.__setitem__, name, module[name])
        module[name] = value

    def close(self) -> None:
        """Leaves the library as it was found."""
        self._undo.close()

    def _kernel(self, name: str, arguments: Sequence[Any]) -> Any:
        found = getattr(self._library, name)
        found.argtypes, found.restype = arguments, None
        return found

    def product(self, x: Any, address: int, outs: int, bias: Any = None) -> Any:
        """Multiplies x [..., in] by a weight [outs, in] that oneDNN has packed, plus ``bias``.

        ``in`` is even; ``torch_linear.Table`` says how such a weight lies at its address.
        """
        x = x.contiguous()
        width = x.shape[-1]
        out = x.new_empty((*x.shape[:-1], outs))
        given = None if bias is None else bias.data_ptr()
        rows = x.numel() // width
        self._product(x.data_ptr(), address, given, out.data_ptr(), rows, width, outs)
        return out

    def norm(self, x: Any, shape: Sequence[int], weight: Any, eps: float) -> Any:
        """As ``torch.nn.functional.rms_norm``, over the last dimension, a multiple of ``LANES``."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = shape[0]
        rows = x.numel() // width
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
        return out

    def gated(self, x: Any) -> Any:
        """silu(gate) * up of x [..., gate and then up]; each is a multiple of ``LANES`` wide."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], width))
        self._gated(x.data_ptr(), out.data_ptr(), out.numel() // width, width)
        return out

    def rotate(self, query: Any, key: Any, cosines: Any, sines: Any) -> tuple[Any, Any]:
        """Rotary embedding of queries and keys [1, heads, tokens, dim] by angles [1, tokens, dim].

        These are contiguous, and ``dim`` is a multiple of twice ``LANES``.
        """
        _, heads, tokens, dim = query.shape
        kv_heads = key.shape[1]
        out = query.new_empty((1, tokens, heads, dim))
        key_out = query.new_empty((1, tokens, kv_heads, dim))
        self._rotate(
            byref(_heads(query[0])),
            byref(_heads(key[0])),
            cosines.data_ptr(),
            sines.data_ptr(),
            out.data_ptr(),
            key_out.data_ptr(),
            tokens,
            heads,
            kv_heads,
            dim,
        )
        return out.transpose(1, 2), key_out.transpose(1, 2)

    # Attention ----------------------------------------------------------------------------------

    @staticmethod
    def attends(shape: "Shape", page_tokens: int) -> bool:
        """Whether there is attention for such a layer."""
        dims = shape.key_dim % _KEY_DIM or shape.value_dim % _VALUE_DIM
        group = shape.heads // shape.kv_heads
        largest = max(shape.key_dim, shape.value_dim)
        return not dims and largest <= _DIM_MAX and group <= _GROUP_MAX and not page_tokens % LANES

    @staticmethod
    def cache(shape: "Shape", keys: Any, values: Any) -> Cache:
        """The cache of one layer; see ``Cache``."""
        return Cache(shape, keys, values)

    def begin(self, layout: StepLayout) -> None:
        """Says what the next calls of ``attend`` are about."""
        arrays = (layout.cells, layout.starts, layout.lengths, layout.tables)
        sizes = (len(layout.tokens), len(layout.lengths), layout.tables.shape[1])
        self._held = arrays
        self._step = _Step(*(array.ctypes.data for array in arrays), *sizes)

    def attend(self, cache: Cache, query: Any, key: Any, value: Any, sinks: Any) -> Any:
        """Writes keys and values of the step to their cells, and attends for all of its tokens.

        ``query``, ``key``, ``value``: [heads, tokens, dim]; the result: [tokens, heads, dim].
        """
        out = query.new_empty((query.shape[1], cache.heads, cache.value_dim))
        if sinks is not None:
            sinks = sinks.float().contiguous()
        self._attend(
            byref(cache.seen),
            byref(self._step),
            byref(_heads(query)),
            byref(_heads(key)),
            byref(_heads(value)),
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
        )
        return out


def _heads(x: Any) -> _Heads:
    """[heads, tokens, dim] as the kernels take it; the caller keeps what it refers to."""
    head_step, token_step, step = x.stride()
    assert step == 1, "numbers of a head lie side by side"
    return _Heads(x.data_ptr(), token_step, head_step)
