"""The accelerators that this build of llama.cpp can compute on, and which of them one engine takes.

llama-cpp-python has no wrapper for these calls, which ``ggml-backend.h`` documents.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp as llama

from shards.engines.base import ModelError
from shards.engines.llama_threads import function

# ggml_backend_dev_type: dedicated memory, and memory that is the machine's.
_GPU, _INTEGRATED = 1, 2
_Pointer = ctypes.c_void_p

_count = function("ggml_backend_dev_count", ctypes.c_size_t)
_get = function("ggml_backend_dev_get", _Pointer, ctypes.c_size_t)
_type = function("ggml_backend_dev_type", ctypes.c_int, _Pointer)
_name = function("ggml_backend_dev_name", ctypes.c_char_p, _Pointer)
_description = function("ggml_backend_dev_description", ctypes.c_char_p, _Pointer)
_memory = function(
    "ggml_backend_dev_memory", None, _Pointer, *[ctypes.POINTER(ctypes.c_size_t)] * 2
)


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator: ggml's handle of it, its short name such as ``CUDA0``, and what it is."""

    pointer: int
    name: str
    description: str

    @property
    def title(self) -> str:
        """What the user is told, such as ``cuda:0 NVIDIA H100 80GB HBM3``."""
        kind = self.name.rstrip("0123456789")
        index = self.name[len(kind) :]
        return f"{kind.lower()}{':' if index else ''}{index} {self.description}".rstrip()

    def memory_free(self) -> int:
        """Bytes that nobody has taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        _memory(self.pointer, ctypes.byref(free), ctypes.byref(total))
        return free.value


def accelerators() -> list[Device]:
    """All that llama.cpp finds: those with memory of their own, or else integrated ones."""
    # Builds that load their backends at run time do so when they are asked this.
    if not llama.llama_supports_gpu_offload():
        return []
    pointers = [_get(index) for index in range(_count())]
    for kind in (_GPU, _INTEGRATED):
        if found := [_device(pointer) for pointer in pointers if _type(pointer) == kind]:
            return found
    return []


def _device(pointer: int) -> Device:
    return Device(pointer, _text(_name(pointer)), _text(_description(pointer)))


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def choose(found: Sequence[Device], word: str) -> list[Device]:
    """Those that ``--device`` means: all if it says nothing or ``gpu``, none if it says ``cpu``.

    Otherwise a kind, such as ``cuda``, or one device, such as ``cuda:1``. Raises ``ModelError``.
    """
    wanted = word.strip().lower().replace(":", "")
    if wanted == "cpu":
        return []
    names = [device.name.lower() for device in found]
    matches = [
        device
        for device, name in zip(found, names, strict=True)
        if wanted in ("", "gpu", name, name.rstrip("0123456789"))
    ]
    if matches or not wanted:
        return matches
    known = ", ".join(device.title for device in found) or "cpu only"
    raise ModelError(f"llamacpp: --device {word}: this build of llama.cpp finds {known}")


def native_list(devices: Sequence[Device]) -> Any:
    """A list of devices as ``llama_model_params`` wants it; it must live while a model loads."""
    return (_Pointer * (len(devices) + 1))(*[device.pointer for device in devices], None)
