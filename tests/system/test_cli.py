"""The ``roundhouse`` command: help, and one line for each thing that a user can get wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.commands import COMMANDS
from deploy.commands import command as command_of
from deploy.models import embedded
from router.config import Settings
from router.options import KNOBS, settings_from


def roundhouse(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | env,
    )


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error."""
    assert result.returncode not in (0, -6, -11)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("serving ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("roundhouse: error: ")
    assert result.stdout == ""
    return lines[0]


def test_help_shows_every_option_with_its_variable() -> None:
    shown = " ".join(roundhouse("serve", "--help").stdout.split())
    for knob in KNOBS:
        assert f"--{knob.name} " in shown
        assert f"env var: {knob.envvar}" in shown.replace("env var: ", "env var: ")
    assert "default: 3000" in shown
    assert "Examples:" in shown


def test_without_options_every_setting_has_its_own_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for knob in KNOBS:
        monkeypatch.delenv(knob.envvar, raising=False)
    given = command_of("serve").make_context("serve", []).params
    assert settings_from(given) == Settings()


@pytest.mark.parametrize(
    ("arguments", "variable", "resumes"),
    [
        ((), "", True),
        (("--no-resume-streams",), "", False),
        ((), "false", False),
        (("--resume-streams",), "false", True),
        (("--no-resume-streams",), "true", False),
    ],
)
def test_a_setting_that_is_on_can_be_turned_off(
    arguments: tuple[str, ...], variable: str, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESUME_STREAMS", variable)
    given = command_of("serve").make_context("serve", list(arguments)).params
    assert settings_from(given).resume_streams is resumes


def test_the_command_knows_the_engines_names_without_importing_any() -> None:
    """Nor what takes long to import: help and mistakes are answered at once."""
    code = "import sys, deploy.commands; deploy.commands.command('serve'); print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout.split()
    assert "shards.engines" in shown
    slow = {"numpy", "torch", "jax", "vllm", "llama_cpp", "grpc", "fastapi", "huggingface_hub"}
    assert not slow & set(shown)


def test_help_of_all_commands_imports_none_of_them_and_says_what_theirs_does() -> None:
    code = "import sys, deploy.commands as c; c.cli(['--help'], standalone_mode=False)"
    code += "; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    *help_lines, modules = shown.splitlines()
    assert not {place.module for place in COMMANDS.values()} & set(modules.split())
    assert "asyncio" not in modules.split()
    told = " ".join(" ".join(help_lines).split())
    for name, place in COMMANDS.items():
        assert f"{name} {place.help}" in told
        text = command_of(name).help
        assert text is not None
        assert " ".join(text.partition("\n\n")[0].split()) == place.help


def test_version() -> None:
    assert roundhouse("--version").stdout.startswith("roundhouse ")


def test_all_bad_values_are_told_at_once() -> None:
    line = only_line(
        roundhouse("serve", "--port", "high", "--max-batch-size=-1", MAX_TOTAL_TOKENS="many")
    )
    assert "port (TCP port)" in line
    assert "max_batch_size (sequences)" in line
    assert "max_total_tokens (tokens)" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("serve", "./no-such.gguf"), "model file ./no-such.gguf does not exist"),
        (("serve", "--engine", "abacus"), "abacus"),
        (("serve", "--no-such-option"), "--no-such-option"),
        (("serve", "--num-shard", "0"), "num-shard"),
        (("router",), "--worker"),
        (("router", "--worker", "nowhere"), "nowhere"),
        (("router", "--worker", "a:1", "--worker", "a:1"), "a:1"),
        (("worker", "./no-such.gguf"), "model file ./no-such.gguf does not exist"),
        (("serve", "--engine", "scripted", "--engine-option", "novalue"), "novalue"),
        (("serve", "--engine", "scripted", "--worker-python", "/no/python"), "/no/python"),
        (
            ("serve", "--engine", "scripted", "--worker-python", "/bin/false"),
            "status 1; /bin/false must be a Python of 3.11 or newer that has this project: put it",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    assert told in only_line(roundhouse(*arguments, PORT="0", GRPC_PORT="0"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model" * 99], ids=len)
def test_a_corrupt_model_file_is_one_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert str(path) in only_line(roundhouse("serve", str(path), PORT="0", GRPC_PORT="0"))


def test_a_model_file_that_was_cut_short_is_one_line_that_names_it(tmp_path: Path) -> None:
    whole = embedded().path
    assert whole is not None
    path = tmp_path / "half.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(whole.stat().st_size // 2))
    assert str(path) in only_line(roundhouse("serve", str(path), PORT="0", GRPC_PORT="0"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("serve", "./no-such.gguf"), "model file ./no-such.gguf does not exist"),
        (("serve", "--no-such-option"), "--no-such-option"),
        (("serve", "--max-batch-size=-1"), "max_batch_size (sequences)"),
        (("router", "--worker", "nowhere"), "nowhere"),
        (("gateway", "--router", "nowhere"), "nowhere"),
        (("serve", "--engine", "scripted", "--engine-option", "a=b"), "unknown engine option a"),
    ],
)
@pytest.mark.parametrize("way", ["typed", "variable"])
def test_a_command_that_speaks_json_fails_in_json(
    arguments: tuple[str, ...], told: str, way: str
) -> None:
    typed = (*arguments, "--json-output") if way == "typed" else arguments
    env = {} if way == "typed" else {"JSON_OUTPUT": "true"}
    found = roundhouse(*typed, PORT="0", GRPC_PORT="0", **env)
    assert found.returncode in (1, 2)
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert [line["level"] for line in lines].count("ERROR") == 1
    assert lines[-1]["target"] == "roundhouse"
    assert told in lines[-1]["message"]


def test_a_config_file_can_ask_for_json_too(tmp_path: Path) -> None:
    path = tmp_path / "roundhouse.toml"
    path.write_text('model = "./no-such.gguf"\njson-output = true\n')
    (line,) = roundhouse("serve", "--config", str(path)).stderr.splitlines()
    assert "no-such.gguf" in json.loads(line)["message"]
