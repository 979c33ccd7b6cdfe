"""A worker whose engine's package is not installed ends with one clear line."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.heavy.models import tiny_llama_folder

CASES = [
    ("sglang", "sglang", [], "roundhouse engines install sglang"),
    ("trtllm", "tensorrt_llm", ["--kv-tokens", "1024"], "docs/engines/trtllm.md"),
    ("neuron", "optimum", [], "docs/engines/neuron.md"),
    ("neuron", "neuronx_distributed_inference", ["--engine-option", "library=nxdi"], "AWS"),
    ("neuron", "vllm_neuron", ["--engine-option", "library=vllm"], "docs/engines/neuron.md"),
]


@pytest.mark.parametrize(("engine", "package", "options", "hint"), CASES)
def test_says_what_is_missing_and_how_to_get_it(
    tmp_path: Path, engine: str, package: str, options: list[str], hint: str
) -> None:
    assert find_spec(package) is None, f"{package} is installed where the plain tests run"
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_folder(), model)
    (model / "neuron_config.json").write_text("{}")
    command = [sys.executable, "-m", "shards", "--engine", engine, "--model", str(model)]
    command += ["--listen", f"unix://{tmp_path}/worker.sock", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    (message,) = [line["message"] for line in told if line["event"] == "error"]
    assert f"engine {engine} needs the package {package}" in message
    assert hint in message
    assert "\n" not in message
