"""Which device the torch engine computes on, with which numbers, and how much fits there.

A device is what the installed torch reports: CUDA (NVIDIA, or AMD through ROCm, which torch also
calls cuda), XPU (Intel), HPU (Gaudi, if Habana's package is installed), MPS (Apple), else the CPU.
"""

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from shards.engines.base import ModelError
from shards.engines.host_memory import memory_bytes
from shards.filters import Floats

KV_TOKENS_MAX = 32768
# Share of the memory that the KV cache may take unasked: of the machine's, which others use too,
# and of what is left on an accelerator once the weights are there (the rest is for activations).
CPU_MEMORY_SHARE = 0.25
ACCELERATOR_MEMORY_SHARE = 0.85

# The collectives of torch.distributed by kind of device.
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "hpu": "hccl"}
# Kinds of devices that write to locked memory of the host.
_PINNING = ("cuda", "xpu")
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Device:
    """Where to compute: ``kind`` is torch's word, ``name`` what the user is told."""

    torch: torch.device
    name: str

    @property
    def kind(self) -> str:
        """``cpu``, ``cuda``, ``xpu``, ``hpu`` or ``mps``."""
        return str(self.torch.type)

    def use(self) -> None:
        """Makes it the one that this thread means when it names none."""
        if self.kind != "cpu":
            torch.accelerator.set_device_index(self.torch.index)


class ToHost:
    """Copies logits to host memory as float32: [rows, vocabulary], valid until the next call.

    Through one buffer that is locked in memory where that helps: a device writes there directly,
    which for 64 rows of 128,000 tokens is the difference between one and ten milliseconds.
    """

    def __init__(self) -> None:
        self._buffer: Any = None

    def __call__(self, logits: Any) -> Floats:
        """Waits until they are there."""
        if logits.device.type not in _PINNING:
            host: Floats = logits.float().cpu().numpy()
            return host
        rows = len(logits)
        if self._buffer is None or len(self._buffer) < rows:
            room = (1 << (rows - 1).bit_length(), logits.shape[1])
            self._buffer = torch.empty(room, dtype=torch.float32, pin_memory=True)
        copied: Floats = self._buffer[:rows].copy_(logits.float()).numpy()
        return copied


def choose_device(wanted: str, rank: int, world: int) -> Device:
    """The device that the user names, or else the best one that torch reports.

    The ranks of a group take the devices of a machine in turn. Raises ``ModelError``.
    """
    available = _accelerator()
    if not wanted:
        if available is None:
            return Device(torch.device("cpu"), "cpu")
        kind, count = available
        return _named(torch.device(kind, rank % count if world > 1 else 0))
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelError(f"torch: --device {wanted} is no device; try cpu or cuda:0") from None
    if device.type == "cpu":
        return Device(device, "cpu")
    kind, count = available or ("cpu", 0)
    if device.type != kind or (device.index or 0) >= count:
        found = f"{count} of kind {kind}" if count else "none besides the cpu"
        raise ModelError(f"torch: there is no device {wanted}; the installed torch reports {found}")
    if device.index is None:
        device = torch.device(kind, rank % count if world > 1 else 0)
    return _named(device)


def _accelerator() -> tuple[str, int] | None:
    """Kind and number of the accelerators that torch reports."""
    if find_spec("habana_frameworks") is not None:
        with suppress(ImportError):
            import_module("habana_frameworks.torch")  # makes "hpu" known to torch
    if not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator().type, torch.accelerator.device_count()


def _named(device: torch.device) -> Device:
    name = f"{device.type}:{device.index}"
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "get_device_name"):
        name = f"{name} {module.get_device_name(device.index)}"
    return Device(device, name)


def choose_dtype(wanted: str, stored: str, device: Device) -> torch.dtype:
    """The type of weights, activations and KV cache. Raises ``ModelError``.

    ``stored`` is the model's own type, or empty. Unasked, 16-bit models stay 16-bit where the
    device multiplies such numbers; on a CPU that means bfloat16 instructions, without which
    float32 is faster.
    """
    if wanted:
        if wanted not in _DTYPES:
            raise ModelError(f"torch: --dtype {wanted} is not one of {', '.join(_DTYPES)}")
        return _DTYPES[wanted]
    if stored == "float32":
        return torch.float32
    if device.kind == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return _DTYPES.get(stored, torch.bfloat16)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 numbers (AVX512-BF16, AMX, or Arm's BF16)."""
    capabilities: dict[str, Any] = {}
    with suppress(AttributeError):
        capabilities = torch.backends.cpu.get_cpu_capability_details()
    if capabilities:
        return bool(capabilities.get("bf16"))
    with suppress(AttributeError):
        return bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - no public name
    return False


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and so on."""
    return str(dtype).removeprefix("torch.")


def kv_tokens_default(device: Device, bytes_per_token: int, length_trained: int, page: int) -> int:
    """Tokens of KV cache when nobody says, in whole pages: what the memory holds, within reason."""
    if device.kind == "cpu":
        room = int(memory_bytes() * CPU_MEMORY_SHARE) // bytes_per_token
        room = min(room, max(KV_TOKENS_MAX, length_trained // 8))
    else:
        free, _total = torch.accelerator.get_memory_info(device.torch)
        room = int(free * ACCELERATOR_MEMORY_SHARE) // bytes_per_token
    return max(page, room // page * page)
