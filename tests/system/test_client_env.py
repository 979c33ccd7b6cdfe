"""Environments of clients: a real virtual environment and pip, with packages of a few bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.client_env import needs
from deploy.declared import declared
from deploy.environment import STAMP, SetupError
from tests.system.test_engine_env import PROJECT, Checkout, make_wheel


def run(checkout: Checkout, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.client_env", *names],
        cwd=checkout.folder,
        env=checkout.env(),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    (made.folder / "pyproject.toml").write_text(f'{PROJECT}\nclients = ["torch==2.0"]\n')
    # This one would ask for what is nowhere if it did not come alone.
    make_wheel(made.wheels, "vllm-tgis-adapter", "0.10.0", needs="nowhere")
    return made


def test_an_environment_is_made_once_and_again_when_its_needs_change(checkout: Checkout) -> None:
    first = run(checkout, "clients")
    assert first.returncode == 0, first.stderr
    python = checkout.home / "clients" / "bin" / "python"
    code = (
        "import torch, vllm_tgis_adapter, pytest, importlib.util as u; print(u.find_spec('router'))"
    )
    said = subprocess.run([python, "-c", code], cwd="/", check=True, capture_output=True, text=True)
    assert said.stdout.splitlines() == ["hello from torch", "None"]
    again = run(checkout, "clients")
    assert (again.returncode, again.stdout) == (0, "")
    make_wheel(checkout.wheels, "jax", "3.0")
    (checkout.folder / "pyproject.toml").write_text(f'{PROJECT}\nclients = ["jax==3.0"]\n')
    assert "clients is ready" in run(checkout, "clients").stdout
    (checkout.folder / "pyproject.toml").write_text(f'{PROJECT}\nclients = ["jax==4.0"]\n')
    failed = run(checkout, "clients")
    assert failed.returncode == 1
    assert "jax==4.0" in failed.stderr
    assert not (checkout.home / "clients" / STAMP).exists()


def test_only_sets_of_clients_can_be_asked_for() -> None:
    project = declared()
    assert any(need.startswith("openai") for need in needs(project, "clients"))
    assert any(need.startswith("text-generation") for need in needs(project, "clients-tgi"))
    with pytest.raises(SetupError, match="there is clients, clients-tgi"):
        needs(project, "torch")
