"""Exponentials for the sampler by llama.cpp's own loop, in a third of the time that numpy takes.

``ggml_vec_soft_max_f32`` is what its attention computes with: ``ggml-cpu/vec.h``. It is not part of
the public interface, so a build need not show it, and another release might change it: the version
of llama-cpp-python is pinned, and numpy does the work where this does not give numpy's results.
"""

import ctypes

import numpy as np

from shards.engines.llama_threads import function
from shards.filters import Floats
from shards.weighing import Weigh, weigh

_soft_max = function(
    "ggml_vec_soft_max_f32",
    ctypes.c_double,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float),
)
# Not a multiple of what a processor's registers hold.
_TRIAL: Floats = np.linspace(-90.0, 0.0, 1021, dtype=np.float32)


def weigher() -> Weigh:
    """The quickest way to weigh that this build of llama.cpp offers."""
    return _by_llama if _soft_max is not None and _agrees() else weigh


def _by_llama(logits: Floats, peak: float, out: Floats) -> float:
    """See ``Weigh``."""
    total: float = _soft_max(len(logits), out.ctypes.data, logits.ctypes.data, peak)
    return total


def _agrees() -> bool:
    """Whether the function does what it is used for."""
    ours, theirs = np.empty_like(_TRIAL), np.empty_like(_TRIAL)
    totals = weigh(_TRIAL, -0.5, ours), _by_llama(_TRIAL, -0.5, theirs)
    return bool(np.allclose(ours, theirs, rtol=1e-5, atol=1e-36) and np.isclose(*totals))
