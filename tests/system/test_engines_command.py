"""``roundhouse engines`` and ``--engine auto``: what is said of an engine, and which is taken."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.engine_probe import BROKEN, MISSING, READY, Answer, absent, ask, judge, probe
from deploy.engines import (
    ALONE,
    ENGINES,
    GGUF,
    PREFERENCES,
    SAFETENSORS,
    Choice,
    Facts,
    choose,
    device_name,
    format_of,
    importable,
    pick,
)
from deploy.engines_command import table
from deploy.environment import STAMP
from deploy.hardware import Hardware
from deploy.interpreters import environment_of
from deploy.models import ModelNotFound, embedded
from deploy.options import UserError
from shards import engines
from shards.engines.base import EngineOptions
from tests.system.server import eventually

ROOT = Path(__file__).resolve().parents[2]


def machine(*kinds: str) -> Hardware:
    return Hardware("a processor", 2, 1 << 30, tuple((kind, f"a {kind}") for kind in kinds))


CPU, NVIDIA = machine(), machine("cuda")


def roundhouse(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


# --- the table's claims


def test_every_engine_that_a_worker_can_host_is_in_the_table() -> None:
    assert set(engines.NAMES) <= set(ENGINES)
    for facts in ENGINES.values():
        assert facts.devices
        assert all(device_name(kind) for kind in facts.devices)
        assert bool(facts.module) == bool(facts.distributions)
    assert set(PREFERENCES) == {kind for facts in ENGINES.values() for kind in facts.devices}


def test_what_is_preferred_can_do_it() -> None:
    for kind, by_format in PREFERENCES.items():
        for model_format, names in by_format.items():
            for name in names:
                assert kind in ENGINES[name].devices, (kind, name)
                assert model_format in ENGINES[name].formats, (model_format, name)


@pytest.mark.parametrize("name", ["llamacpp", "scripted"])
def test_the_table_says_what_the_engine_says_of_itself(name: str) -> None:
    facts = ENGINES[name]
    model = embedded().path if facts.formats else None
    options = EngineOptions(model=model, model_id="m", threads=1, kv_tokens=512)
    engine = engines.load(name, options, lambda _: None)
    try:
        info = engine.describe()
    finally:
        engine.close()
    assert info.engine == name
    assert info.scheduling.value == facts.kind
    assert set(facts.features) <= set(info.features) <= {*facts.features, *facts.optional}


@pytest.mark.parametrize("name", engines.NAMES)
def test_the_table_says_what_the_engines_source_says(name: str) -> None:
    """Most engines can be imported in their own environment alone; their text can be read here."""
    module = engines._MODULES[name].rpartition(".")[2]
    tree = ast.parse((ROOT / "shards" / "engines" / f"{module}.py").read_text())
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    kinds = {
        node.attr.lower()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Scheduling"
    }
    facts = ENGINES[name]
    all_features = {
        feature for one in ENGINES.values() for feature in (*one.features, *one.optional)
    }
    assert words & all_features == {*facts.features, *facts.optional}
    assert dict(facts.conditions).keys() <= set(facts.features)
    # An engine that schedules by itself may leave saying so to what these have in common.
    assert kinds <= {facts.kind}


# --- the choice


@pytest.mark.parametrize(
    ("hardware", "model_format", "installed", "world", "wanted"),
    [
        (CPU, GGUF, {"llamacpp", "torch"}, 1, "llamacpp"),
        (CPU, GGUF, {"torch"}, 1, "torch"),
        (CPU, GGUF, {"llamacpp", "torch"}, 2, "torch"),
        (CPU, SAFETENSORS, {"llamacpp", "torch", "vllm"}, 1, "torch"),
        (CPU, SAFETENSORS, {"vllm", "jax"}, 1, "vllm"),
        (CPU, SAFETENSORS, {"jax"}, 2, "jax"),
        (NVIDIA, SAFETENSORS, {"torch", "vllm"}, 1, "vllm"),
        (NVIDIA, SAFETENSORS, {"torch", "jax"}, 1, "torch"),
        (NVIDIA, SAFETENSORS, {"trtllm"}, 1, "trtllm"),
        (NVIDIA, GGUF, {"llamacpp", "vllm"}, 1, "llamacpp"),
        (machine("rocm"), SAFETENSORS, {"vllm", "torch"}, 1, "vllm"),
        (machine("tpu"), SAFETENSORS, {"torch", "jax"}, 1, "jax"),
        (machine("tpu"), GGUF, {"llamacpp"}, 1, "llamacpp"),
        (machine("neuron"), SAFETENSORS, {"neuron", "torch"}, 1, "neuron"),
        (NVIDIA, SAFETENSORS, {"trtllm", "torch"}, 2, "torch"),
        (machine("hpu"), SAFETENSORS, {"torch"}, 1, "torch"),
        (machine("xpu"), SAFETENSORS, {"torch"}, 1, "torch"),
        (machine("metal"), GGUF, {"llamacpp"}, 1, "llamacpp"),
    ],
)
def test_the_engine_follows_format_hardware_and_what_is_installed(
    hardware: Hardware, model_format: str, installed: set[str], world: int, wanted: str
) -> None:
    choice = pick(model_format, hardware, installed, world)
    assert isinstance(choice, Choice)
    assert choice.engine == wanted
    assert model_format in choice.why


def test_the_reason_names_what_would_have_been_better() -> None:
    choice = pick(SAFETENSORS, NVIDIA, {"torch"})
    assert choice == Choice(
        "torch", "best installed engine for safetensors on an NVIDIA GPU; vllm not installed"
    )


def test_if_nothing_is_installed_the_best_is_suggested() -> None:
    told = pick(SAFETENSORS, CPU, {"llamacpp"})
    assert isinstance(told, str)
    assert told.startswith(
        "no engine for safetensors is installed; try: roundhouse engines install"
    )
    assert "install torch" in told
    told = pick(GGUF, CPU, {"llamacpp"}, world=2)
    assert isinstance(told, str)
    assert "for gguf in 2 ranks" in told


def test_the_format_is_read_off_the_disk_and_off_names(tmp_path: Path) -> None:
    hf, gguf, both, empty = (tmp_path / name for name in ("hf", "gguf", "both", "empty"))
    for folder in (hf, gguf, both, empty):
        folder.mkdir()
    for folder in (hf, both):
        (folder / "config.json").write_text("{}")
    (hf / "model.safetensors").touch()
    for folder in (gguf, both):
        (folder / "a.gguf").touch()
    (gguf / "called-otherwise").write_bytes(b"GGUF\3")
    assert format_of(None) == GGUF
    assert format_of(str(hf)) == SAFETENSORS
    assert format_of(str(gguf)) == GGUF
    assert format_of(str(gguf / "a.gguf")) == GGUF
    assert format_of(str(gguf / "called-otherwise")) == GGUF
    # Repositories of GGUF files often have the configuration of the original beside them.
    assert format_of(str(both)) == GGUF
    assert format_of("Qwen/Qwen3-0.6B") == SAFETENSORS
    assert format_of("Qwen/Qwen3-0.6B-GGUF") == GGUF
    assert format_of("Qwen/Qwen3-0.6B", "Q8_0") == GGUF
    with pytest.raises(
        ModelNotFound, match=r"neither config\.json with \*\.safetensors nor a GGUF file$"
    ):
        format_of(str(empty))
    with pytest.raises(ModelNotFound, match=r"no GGUF file, which is all that llama\.cpp reads"):
        format_of(str(hf), "Q8_0")
    for nothing in ("./none", str(tmp_path / "none.gguf"), "~/no/such"):
        with pytest.raises(ModelNotFound, match="does not exist"):
            format_of(nothing)


def test_either_library_makes_neuron_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not importable("neuron")
    (tmp_path / "neuronx_distributed_inference").mkdir()
    (tmp_path / "neuronx_distributed_inference" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert importable("neuron")


def test_choosing_here_takes_what_is_here(tmp_path: Path) -> None:
    engine, why = choose(None)
    assert engine == "llamacpp"
    assert why.startswith("llamacpp: best installed engine for gguf")
    with pytest.raises(UserError, match="neither config"):
        choose(str(tmp_path))


def test_serve_says_which_engine_it_took_or_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr("deploy.engines.importable", lambda name: name == "llamacpp")
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"^no engine for .*roundhouse engines install"):
        choose(str(tmp_path))
    # Perhaps a path was meant; perhaps it holds GGUF files without saying so in its name.
    told = r"^no/such is not here, and as a hub id it is taken for safetensors .* --engine llamacpp"
    with pytest.raises(UserError, match=told):
        choose("no/such")


# --- what is said of an engine


def test_what_hinders_most_is_said_first() -> None:
    report = absent(ENGINES["trtllm"], CPU, interrupted=False)
    assert (report.state, report.why) == (MISSING, "runs on an NVIDIA GPU, and there is none here")
    report = absent(ENGINES["llamacpp"], CPU, interrupted=True)
    assert report.why == "its installation was interrupted"
    assert report.mend == "roundhouse engines install llamacpp"
    report = absent(ENGINES["llamacpp"], CPU, interrupted=False)
    assert report.why == "package llama-cpp-python is missing"
    assert report.mend == "roundhouse engines install llamacpp"
    other = Facts(
        *("x", "", "caller", (), ("cpu",)), ranks=ALONE, features=(),
        distributions=("x",), extra="llamacpp", python=((3, 8), (3, 9)),
    )  # fmt: skip
    report = absent(other, CPU, interrupted=False)
    assert report.why.startswith("needs Python 3.8 to 3.8, and this is 3.")
    assert report.mend == "roundhouse engines install x --python python3.8"


@pytest.mark.parametrize(
    ("answer", "hardware", "state", "told"),
    [
        (Answer("2.13", ("cpu",)), CPU, READY, ""),
        (Answer("2.13", ("cuda:0 H100", "cpu")), NVIDIA, READY, ""),
        (Answer("2.13", ("cpu",)), NVIDIA, READY, "leaves an NVIDIA GPU idle"),
        (Answer("2.13", ("cpu:0",)), NVIDIA, READY, "leaves an NVIDIA GPU idle"),
        (Answer("2.13", ("cpu",), roundhouse="0.0.1"), CPU, READY, "has Roundhouse 0.0.1"),
        (Answer(error="OSError: libtorch.so"), CPU, BROKEN, "OSError: libtorch.so"),
        (Answer("2.13", ("cpu",), worker=False), CPU, BROKEN, "lacks Roundhouse's worker"),
    ],
)
def test_what_an_interpreter_says_is_judged(
    answer: Answer, hardware: Hardware, state: str, told: str
) -> None:
    report = judge(ENGINES["torch"], hardware, answer, where="/env", apart=True)
    assert report.state == state
    assert told in f"{report.why}{report.note}"
    assert bool(report.mend) == (state != READY)
    if state == BROKEN:
        assert report.mend == "roundhouse engines install torch --again"


def test_an_engine_whose_device_is_not_here_does_not_run() -> None:
    report = judge(ENGINES["trtllm"], CPU, Answer("1.2.1", ("cpu",)), where="/env", apart=True)
    assert (report.state, report.why) == (BROKEN, "runs on an NVIDIA GPU, and there is none here")


def interpreter(folder: Path, script: str) -> str:
    """A stand-in for an engine's interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "told", "deadline_s"),
    [
        ("exec sleep 100", "did not answer within 0.5 s", 0.5),
        ("echo 'no module named x' >&2; exit 1", "failed: no module named x", 60.0),
        ("echo hello", "its interpreter failed: no output", 60.0),
        ("echo '[1]'", "its interpreter failed", 60.0),
    ],
)
def test_an_interpreter_that_does_not_answer_well_is_one_line(
    tmp_path: Path, script: str, told: str, deadline_s: float
) -> None:
    answer = ask(interpreter(tmp_path, script), ENGINES["torch"], deadline_s=deadline_s)
    assert told in answer.error


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "cannot be run" in ask(str(tmp_path / "none"), ENGINES["torch"]).error


def test_an_engine_in_its_own_environment_is_asked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path))
    folder = environment_of("torch")
    (folder / "bin").mkdir(parents=True)
    said = {
        "version": "9.9",
        "devices": ["xpu:0 Arc", "cpu"],
        "python": "3.12.0",
        "roundhouse": "",
        "worker": True,
        "error": "",
        "found": True,
    }
    interpreter(folder / "bin", f"echo noise; echo '{json.dumps(said)}'")
    assert probe(ENGINES["torch"], CPU).why == "its installation was interrupted"
    (folder / STAMP).write_text("{}")
    report = probe(ENGINES["torch"], CPU)
    assert (report.state, report.version) == (READY, "9.9")
    assert report.devices == ("xpu:0 Arc", "cpu")
    assert report.where == str(folder)


def test_this_interpreter_is_asked_without_importing_anything_here() -> None:
    answer = ask(sys.executable, ENGINES["llamacpp"])
    assert answer.error == ""
    assert answer.devices[-1] == "cpu"
    assert answer.version.startswith("0.3.")
    assert answer.worker
    missing = ask(sys.executable, Facts(
        *("x", "", "caller", (), ("cpu",)), ranks=ALONE, features=(),
        module="no_such.module", library="torch", distributions=("no-such",),
    ))  # fmt: skip
    assert (missing.version, missing.devices, missing.error) == ("", (), "")


def test_the_command_lists_every_engine(tmp_path: Path) -> None:
    shown = roundhouse("engines", ROUNDHOUSE_HOME=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    first = [line.split()[0] for line in shown.stdout.splitlines()[2:] if line[:1].strip()]
    assert first == ["engine", *ENGINES]
    told = roundhouse("engines", "--json", ROUNDHOUSE_HOME=str(tmp_path))
    rows = {row["engine"]: row for row in json.loads(told.stdout)}
    assert set(rows) == set(ENGINES)
    assert rows["llamacpp"]["runs"]
    assert rows["llamacpp"]["scheduling"] == "caller"
    assert rows["scripted"]["state"] == READY
    assert all(row["why"] and row["mend"] for row in rows.values() if not row["runs"])
    assert rows["vllm"]["conditions"] == {"prompt_logprobs": "without adapters"}
    assert "prompt_logprobs (without adapters)" in " ".join(shown.stdout.split())
    assert [name for name, row in rows.items() if row["conditions"]] == ["vllm"]


def test_a_command_that_takes_long_says_that_it_is_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "engines" / "torch"
    (folder / "bin").mkdir(parents=True)
    (folder / STAMP).write_text("{}")
    interpreter(folder / "bin", f"touch {tmp_path}/asked; sleep 4; exit 1")
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "engines"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ROUNDHOUSE_HOME": str(tmp_path)},
    )
    eventually((tmp_path / "asked").exists)
    shown, errors = process.communicate(timeout=60)
    assert errors == "asking each engine in its own interpreter ...\n"
    assert "its interpreter failed: no output; roundhouse engines install torch --again" in shown


def test_lines_of_the_table_fit_and_say_what_to_do() -> None:
    reports = [absent(facts, CPU, interrupted=False) for facts in ENGINES.values() if facts.module]
    lines = table(reports)
    assert all(len(line) <= 100 for line in lines)
    assert sum("cannot run here: " in line for line in lines) == len(reports)
