"""Runs inside an engine's interpreter, as a script, and says in one JSON line what is there.

``python -P probe_script.py MODULE LIBRARY DISTRIBUTION...``: imports LIBRARY (torch, jax,
llama_cpp) to ask it for its devices. Standard library otherwise: the environment may hold nothing
else of ours.
"""

import importlib
import importlib.util
import json
import os
import re
import sys
from importlib import metadata


def version_of(names: list[str]) -> str:
    """The version of the first distribution that is installed, or nothing."""
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    for found in metadata.distributions():
        if re.sub(r"[-_.]+", "-", found.name or "").lower() in wanted:
            return found.version
    return ""


def has(module: str) -> bool:
    """Whether a module can be found; a dotted name's parent may be missing."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def torch_devices() -> list[str]:
    """Accelerators that torch can use: kind, index and name."""
    import torch

    found = []
    for kind in ("cuda", "xpu", "hpu"):
        part = getattr(torch, kind, None)
        if part is not None and part.is_available():
            shown = "rocm" if kind == "cuda" and torch.version.hip else kind
            names = (part.get_device_name(index) for index in range(part.device_count()))
            found += [f"{shown}:{index} {name}" for index, name in enumerate(names)]
    return [*found, "cpu"]


def jax_devices() -> list[str]:
    """Devices of jax's default backend. Memory is not taken for it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    kinds = {"gpu": "cuda"}
    return [
        f"{kinds.get(one.platform, one.platform)}:{one.id} {one.device_kind}".removesuffix(" cpu")
        for one in jax.devices()
    ]


def llama_devices() -> list[str]:
    """What this build of llama.cpp can compute on."""
    import llama_cpp

    return [*(["gpu"] if llama_cpp.llama_supports_gpu_offload() else []), "cpu"]


LIBRARIES = {"torch": torch_devices, "jax": jax_devices, "llama_cpp": llama_devices}


def main(module: str, library: str, names: list[str]) -> dict[str, object]:
    """All that is asked for; what goes wrong is said in ``error``."""
    said: dict[str, object] = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "roundhouse": version_of(["roundhouse-llm"]),
        "version": version_of(names) if names else version_of(["roundhouse-llm"]),
        "found": not module or has(module),
        "worker": has("shards"),
        "devices": [],
        "error": "",
    }
    if said["found"] and library:
        try:
            said["devices"] = LIBRARIES[library]()
        except Exception as error:  # noqa: BLE001 - whatever a driver may raise is the answer
            first = str(error).strip().splitlines()
            said["error"] = f"{type(error).__name__}: {first[0] if first else ''}"
    return said


if __name__ == "__main__":
    # Libraries print when they are imported; the answer is the last line.
    answer = main(sys.argv[1], sys.argv[2], sys.argv[3:])
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # runtimes of accelerators take seconds to be dismantled
