"""What this machine computes with, as its files say: no driver library is loaded, nothing is asked.

Each accelerator's driver leaves device files and descriptions in ``/proc``, ``/sys`` and ``/dev``.
Seeing one says that the device and its driver are here, not that an engine can use it.
"""

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# PCI vendors of accelerators that share a kind of device file.
_GOOGLE, _HABANA, _INTEL = "0x1ae0", "0x1da3", "0x8086"
# Intel's drivers for its GPUs.
_INTEL_DRIVERS = ("xe", "i915")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The processor, and the accelerators: pairs of kind and name.

    Kinds: "cuda" (NVIDIA), "rocm" (AMD), "xpu" (Intel), "hpu" (Gaudi), "tpu", "neuron", "metal".
    """

    cpu: str
    cores: int
    memory_bytes: int
    accelerators: tuple[tuple[str, str], ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of device an engine may use, accelerators first; "cpu" is always last."""
        return (*dict.fromkeys(kind for kind, _ in self.accelerators), "cpu")

    def named(self, kinds: tuple[str, ...]) -> list[str]:
        """The devices of these kinds for people: ``cpu (2 cores)``, ``cuda: 2 x NVIDIA H100``."""
        counts = Counter(device for device in self.accelerators if device[0] in kinds)
        names = [
            f"{kind}: {f'{count} x ' if count > 1 else ''}{name}"
            for (kind, name), count in counts.items()
        ]
        return [*names, f"cpu ({self.cores} cores)"] if "cpu" in kinds else names

    def fingerprint(self) -> str:
        """One line that differs between machines whose speeds differ."""
        devices = ", ".join(f"{kind} {name}" for kind, name in self.accelerators) or "none"
        gib = round(self.memory_bytes / 2**30)
        return f"{self.cpu}, {self.cores} cores, {gib} GiB, accelerators: {devices}"


def detect(root: Path = Path("/")) -> Hardware:
    """Looks at this machine; ``root`` is where its files are, for tests."""
    found = [device for look in _LOOKS for device in look(root)]
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found.append(("metal", "Apple GPU"))
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Hardware(_cpu(root), _cores(), pages * page_bytes, tuple(found))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu(root: Path) -> str:
    found = re.search(r"^model name\s*: (.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _nvidia(root: Path) -> Iterator[tuple[str, str]]:
    """The kernel driver describes each GPU; in some containers only the device files are seen."""
    described = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    for path in described:
        found = re.search(r"^Model:\s*(.+)$", _text(path), re.MULTILINE)
        yield "cuda", found[1] if found else "NVIDIA GPU"
    if not described:
        yield from (("cuda", "NVIDIA GPU") for _ in sorted(root.glob("dev/nvidia[0-9]*")))


def _amd(root: Path) -> Iterator[tuple[str, str]]:
    """The compute driver's topology lists CPUs too; GPUs are the nodes that have SIMD units."""
    for path in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        found = re.search(r"^simd_count (\d+)$", _text(path), re.MULTILINE)
        if found and int(found[1]):
            yield "rocm", "AMD GPU"


def _intel(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.glob("sys/class/drm/renderD*/device")):
        driver = (path / "driver").resolve().name
        if _text(path / "vendor").strip() == _INTEL and driver in _INTEL_DRIVERS:
            yield "xpu", "Intel GPU"


def _accel(root: Path) -> Iterator[tuple[str, str]]:
    """Gaudi, and TPUs whose driver is the kernel's."""
    names = {_HABANA: ("hpu", "Gaudi"), _GOOGLE: ("tpu", "TPU")}
    for path in sorted(root.glob("sys/class/accel/accel*/device/vendor")):
        vendor = _text(path).strip()
        if vendor in names:
            yield names[vendor]


def _tpu(root: Path) -> Iterator[tuple[str, str]]:
    """TPUs that are passed to user space as PCI devices."""
    for path in sorted(root.glob("sys/bus/pci/drivers/vfio-pci/*/vendor")):
        if _text(path).strip() == _GOOGLE:
            yield "tpu", "TPU"


def _neuron(root: Path) -> Iterator[tuple[str, str]]:
    yield from (("neuron", "Neuron device") for _ in sorted(root.glob("dev/neuron[0-9]*")))


_LOOKS: tuple[Callable[[Path], Iterator[tuple[str, str]]], ...] = (
    *(_nvidia, _amd, _neuron),
    *(_accel, _tpu, _intel),
)


def _text(path: Path) -> str:
    """What a file says; nothing if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
