"""``roundhouse tune`` with engines that compute: two of them, each on its own copy of one model."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.interpreters import installed_apart
from tests.heavy.models import smollm2_folder, smollm2_gguf
from tests.system.server import serving
from tests.system.test_tune_command import QUICK


def test_engines_on_copies_of_a_model_and_the_winner_is_served(tmp_path: Path) -> None:
    assert installed_apart("torch"), "roundhouse engines install torch"
    output = tmp_path / "best.toml"
    shape = ("--prompt-tokens", "16", "--new-tokens", "8", "--concurrency", "3")
    tries = (
        f"llamacpp,threads=1,model={smollm2_gguf()}",
        "torch,threads=1",
        "torch,threads=1,dtype=int3",
    )
    ended = subprocess.run(
        [
            *(sys.executable, "-c", QUICK, "tune", str(smollm2_folder()), *shape),
            *("--output", str(output), *(part for one in tries for part in ("--try", one))),
        ],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    best, second, failed = ended.stdout.splitlines()[1:4]
    # Four bits a weight against the model's own 16 or 32: whichever the machine, one is faster.
    assert {best.removeprefix("*").split()[0], second.split()[0]} == {"llamacpp", "torch"}
    assert best.startswith("*")
    assert "dtype=int3" in failed
    assert "int3" in failed.partition("  -  ")[2], "why it failed"
    assert (tmp_path / "best.svg").read_text().count("<rect") == 3

    config = tomllib.loads(output.read_text())
    assert config["engine"] in best
    assert config["model"] == str(
        smollm2_gguf() if config["engine"] == "llamacpp" else smollm2_folder()
    )
    with serving(tmp_path, "--config", str(output)) as server:
        body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        answer = server.client.post("/v1/completions", json=body)
        assert "Paris" in answer.json()["choices"][0]["text"]
