"""What the torch engine does unasked, and what it refuses when it is asked for."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from shards.engines.base import ModelError
from shards.engines.torch_devices import Device, dtype_name
from shards.engines.torch_linear import can_pack

if TYPE_CHECKING:
    from shards.engines.torch_draw_kernel import DrawKernel
    from shards.engines.torch_kernel import PagedKernel
    from shards.engines.torch_native import Native

_COMPILES = ("cuda", "cpu")


def packs(wanted: str, device: Device, dtype: torch.dtype, *, compiling: bool) -> bool:
    """Whether weights are packed: ``wanted`` is ``on``, ``off`` or ``auto``.

    Raises ``ModelError`` where they are wanted and cannot be.
    """
    able = device.kind == "cpu" and can_pack(dtype)
    if wanted == "on" and not able:
        raise ModelError(
            f"torch: engine option pack=on: this torch has no packed products of"
            f" {dtype_name(dtype)} for this {device.kind}; leave it out"
        )
    if wanted == "on" and compiling:
        raise ModelError(
            "torch: engine option compile=on: packed weights cannot be compiled; leave out"
            " compile=on or pack=on"
        )
    return able and wanted != "off" and not compiling


def choose_native(
    wanted: str, dtype: torch.dtype, *, packing: bool
) -> tuple["Native | None", tuple[str, ...]]:
    """Kernels of our own for CPUs, if any, and what to warn of; see ``packs``."""
    able = packing and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public one
    if wanted == "on" and not able:
        raise ModelError(
            "torch: engine option native=on: the kernels are for packed bfloat16 weights on CPUs"
            " with AVX512-BF16 and without AMX; leave it out"
        )
    if wanted == "off" or not able:
        return None, ()
    from shards.engines.native_build import BuildError
    from shards.engines.torch_native import Native

    try:
        return Native(), ()
    except BuildError as error:
        if wanted == "on":
            raise ModelError(f"torch: engine option native=on: {error}; leave it out") from error
        return None, (f"kernels of our own, about twice as fast, are not used: {error}",)


def compiles(wanted: str, device: Device, *, graphs: bool, world: int) -> bool:
    """Whether layers are compiled: ``wanted`` is ``on``, ``off`` or ``auto``; see ``packs``."""
    if wanted == "auto":
        captured = device.kind == "cuda" and graphs and world == 1
        return captured and find_spec("triton") is not None
    if wanted == "off":
        return False
    fault = None
    if device.kind not in _COMPILES:
        fault = f"is not for {device.kind}"
    elif not graphs:
        fault = "is for decode steps that are captured, and graphs=off"
    elif world > 1:
        fault = f"is for one rank, and there are {world}"
    if fault is not None:
        raise ModelError(f"torch: engine option compile=on {fault}; leave it out")
    return True


def choose_kernel(wanted: str, device: Device) -> "PagedKernel | None":
    """What attends for decoding sequences; None: pages are gathered. ``wanted``: see the engine."""
    able = device.kind == "cuda" and find_spec("triton") is not None
    if wanted == "gather" or (wanted == "auto" and not able):
        return None
    if not able:
        raise ModelError(
            f"torch: engine option attention=kernel needs CUDA and Triton, and this is"
            f" {device.kind}; leave it out"
        )
    from shards.engines.torch_kernel import PagedKernel

    return PagedKernel(device.torch)


def choose_draw_kernel(device: Device, vocab_size: int) -> "DrawKernel | None":
    """What draws rows of all kinds at once; None: torch's own operations do."""
    if device.kind != "cuda" or find_spec("triton") is None:
        return None
    from shards.engines.torch_draw_kernel import DrawKernel

    return DrawKernel(vocab_size)
