"""A core for each of OpenMP's compute threads, while there are as many of these as cores.

Compute threads wait for each other after every operation. A thread that slept is woken on the core
of the one that woke it if the router has the other core at that moment, and then both share one
core until the kernel looks at them again, milliseconds later: an operation takes twice as long.
(vLLM inside, two cores, 8 clients: 1.2 to 1.3 times the tokens a second.) Bound, they cannot meet.
Nothing is lost by it: where every core has a compute thread, all others share with one anyway.
With fewer threads than cores nothing is bound, so that they can make way.

What binds is a parallel region of the calling thread, whose team computes its operations later
(``GOMP_parallel``, which GNU's, LLVM's and Intel's OpenMP have). Linux only.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAPS = Path("/proc/self/maps")
_NAMES = ("libgomp", "libiomp", "libomp")
# Whoever has set one of these has decided where threads go.
_DECIDED = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Cores:
    """Those of the thread that makes this; to be made and used on the thread that computes.

    Threads that it starts while some are bound would share its core, so it should start none.
    """

    def __init__(self) -> None:
        self._all = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        decided = any(name in os.environ for name in _DECIDED)
        self._library = None if decided or len(self._all) < 2 else _library()
        self._bound = False

    def follow(self, threads: int) -> None:
        """Binds the threads of the next operations, or lets go of them; 0: there will be none."""
        wanted = threads == len(self._all)
        if self._library is None or wanted is self._bound:
            return
        self._bound = wanted
        _in_each(self._library, len(self._all), self._bind if wanted else self._free)

    def _bind(self, number: int) -> None:
        os.sched_setaffinity(0, {self._all[number]})

    def _free(self, _number: int) -> None:
        os.sched_setaffinity(0, self._all)


def _in_each(library: Any, count: int, act: Callable[[int], None]) -> None:
    """Calls a function on each of the calling thread's compute threads, with its number."""

    def region(_: int | None) -> None:
        act(library.omp_get_thread_num())

    library.GOMP_parallel(_REGION(region), None, count, 0)


def openmp_path() -> Path | None:
    """The OpenMP that this process computes with, or None if that cannot be told."""
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return None
    paths = {line.split()[-1] for line in lines if "/lib" in line}
    found = [path for path in map(Path, paths) if path.name.startswith(_NAMES)]
    return found[0] if len(found) == 1 else None


def _library() -> Any:
    """The OpenMP that this process computes with, or None; see ``openmp_path``."""
    path = openmp_path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "GOMP_parallel"):
        return None
    library.GOMP_parallel.argtypes = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    return library
