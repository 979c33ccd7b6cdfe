"""The threads that llama.cpp computes with, kept from step to step.

Without a pool of one's own llama.cpp makes its threads anew for each step and ends them with it.
On a machine that was idle a new thread starts on the core of the one that made it, which then waits
for it: a step after a pause took up to twice as long. llama-cpp-python has no wrapper for these
calls, which ``ggml.h``, ``ggml-cpu.h`` and ``llama.h`` document.
"""

import ctypes
from typing import Any

from llama_cpp import llama_cpp

# How long a thread without work looks for some before it sleeps: ``ggml_threadpool_params``, 0 to
# 100. Looking takes the core from the router and from other programs.
_POLL = 0
# GGML_MAX_N_THREADS.
_THREADS_LIMIT = 512


class _Params(ctypes.Structure):
    """``struct ggml_threadpool_params``."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * _THREADS_LIMIT),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


def function(name: str, result: Any, *arguments: Any) -> Any:
    """A function of llama.cpp or of the libraries below it; None where a build lacks it."""
    function = getattr(llama_cpp._lib, name, None)  # noqa: SLF001 - the only handle there is
    if function is not None:
        function.restype, function.argtypes = result, arguments
    return function


_init = function("ggml_threadpool_params_init", None, ctypes.POINTER(_Params), ctypes.c_int)
_new = function("ggml_threadpool_new", ctypes.c_void_p, ctypes.POINTER(_Params))
_free = function("ggml_threadpool_free", None, ctypes.c_void_p)
_attach = function("llama_attach_threadpool", None, *[ctypes.c_void_p] * 3)


class ThreadPool:
    """``threads_max`` threads, the caller's included, of which a step may use fewer.

    Serves any number of contexts, one step at a time, and outlives them. Builds that load their
    backends at run time do not show these calls: there llama.cpp goes on making its own threads.
    """

    def __init__(self, threads_max: int) -> None:
        self.threads_max = min(threads_max, _THREADS_LIMIT)
        self._pointer = self._make() if None not in (_init, _new, _free, _attach) else None

    def _make(self) -> int | None:
        params = _Params()
        _init(ctypes.byref(params), self.threads_max)
        params.poll = _POLL
        pointer: int | None = _new(ctypes.byref(params))
        return pointer

    def attach(self, context: Any) -> None:
        """Makes a ``llama_context`` compute with these threads."""
        if self._pointer is not None:
            _attach(context, self._pointer, None)

    def close(self) -> None:
        """Ends the threads. The contexts must be gone."""
        if self._pointer is not None:
            _free(self._pointer)
            self._pointer = None
