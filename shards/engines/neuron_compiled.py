"""Where vLLM's Neuron plugin finds the model that it compiled, and whether it is the right one.

The plugin looks into the folder that an environment variable names. Without one it deletes what it
compiled at its last start. It takes whatever is there, and passes over what it was asked for. So
each choice of sizes has a folder of its own, and one that an operator names is compared.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.engines.base import ModelError
from shards.engines.self_model import installed_version
from shards.hf_folder import read_json

VARIABLE = "NEURON_COMPILED_ARTIFACTS"
CONFIG = "neuron_config.json"
# What it was compiled by: another release may compile another program.
_COMPILERS = ("vllm-neuron", "neuronx-distributed-inference", "neuronx-cc", "torch-neuronx")


def folder_for(model: Path, named: str, arguments: Mapping[str, Any]) -> Path:
    """The folder that was named; or one inside the model's, for these arguments and weights."""
    if named:
        return Path(named).absolute()
    weights = sorted(
        (path.name, path.stat().st_size, int(path.stat().st_mtime))
        for path in model.iterdir()
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    versions = [(name, installed_version(name)) for name in _COMPILERS]
    told = {key: value for key, value in arguments.items() if key != "model"}
    text = json.dumps([told, weights, versions], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return model / "neuron-compiled-artifacts" / f"roundhouse-{digest}"


def check(folder: Path, wanted: Mapping[str, tuple[object, str]]) -> None:
    """Raises ``ModelError`` if the model there was compiled with other sizes, or to draw itself.

    ``wanted`` has each field's value, and the option that asks for it. A folder without a compiled
    model is as good as any.
    """
    if not (folder / CONFIG).is_file():
        return
    found = read_json(folder / CONFIG).get("neuron_config")
    if not isinstance(found, dict):
        raise ModelError(f"model file {folder / CONFIG}: lacks 'neuron_config'")
    for name, (value, option) in wanted.items():
        if found.get(name) != value:
            raise ModelError(
                f"neuron: {folder} was compiled with {name} {found.get(name)}, and {option} asks"
                f" for {value}; change that, or name another folder with --engine-option compiled="
            )
    if found.get("on_device_sampling_config") is not None:
        raise ModelError(
            f"neuron: {folder} was compiled to draw on the device, which this adapter does not"
            " serve; name another folder with --engine-option compiled="
        )
