"""From options, the environment and a config file to groups of workers."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from deploy.commands import command as command_of
from deploy.environment import STAMP
from deploy.groups import GROUP_KEYS, LocalGroup, local_groups
from deploy.interpreters import interpreter_of
from deploy.options import UserError
from deploy.workers import WorkerOptions, worker_command

SCRIPTED = ("--engine", "scripted")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path / "home"))
    for name in ("THREADS", "ENGINE", "NUM_SHARD", "MAX_TOTAL_TOKENS", "ENGINE_OPTION"):
        monkeypatch.delenv(name, raising=False)


def options(*arguments: str) -> Mapping[str, Any]:
    return command_of("serve").make_context("serve", list(arguments)).params


def groups(*arguments: str) -> list[LocalGroup]:
    return local_groups(options(*arguments))


def config(tmp_path: Path, text: str) -> tuple[str, str]:
    path = tmp_path / "roundhouse.toml"
    path.write_text(text)
    return "--config", str(path)


def test_one_group_is_what_the_options_say() -> None:
    (group,) = groups(
        *SCRIPTED, "--num-shard", "3", "--threads", "2", "--device", "d", "--dtype", "float32",
        "--engine-option", "step_ms=5", "--engine-option", "length=2", "--kv-tokens", "7",
        "--sequences-max", "8", "--step-tokens-max", "9", "--worker-python", "/p", "name",
    )  # fmt: skip
    assert (group.name, group.model.model_id, group.model.path) == ("scripted", "name", None)
    assert group.workers == WorkerOptions(
        "scripted", 3, 2, 7, 8, 9, "d", "float32", (), ("step_ms=5", "length=2"), "/p"
    )


def test_an_engine_that_reads_types_from_its_file_is_told_of_none() -> None:
    """Before anything is downloaded; and with ``--group`` the others may be told."""
    with pytest.raises(UserError, match=r"llamacpp: --dtype float32: the GGUF file says .* --file"):
        groups("nobody/has-this", "--dtype", "float32", "--engine", "llamacpp")
    first, second = groups("--group", "scripted,dtype=float32", "--group", "llamacpp")
    assert (first.workers.dtype, second.workers.dtype) == ("float32", "")


def test_an_engine_that_is_not_installed_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.groups.importable", lambda name: name == "scripted")
    told = r"sglang needs the package sglang, .*; try: roundhouse engines install sglang$"
    with pytest.raises(UserError, match=told):
        groups("nobody/has-this", "--engine", "sglang")
    with pytest.raises(UserError, match=r"optimum\.neuron, .*; see docs/engines/neuron\.md$"):
        groups("nobody/has-this", "--group", "scripted", "--group", "neuron")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    (group,) = groups(str(tmp_path), "--engine", "sglang", "--worker-python", "/p")
    assert group.workers.interpreter == "/p"  # which knows for itself


def test_the_embedded_model_is_not_for_engines_that_read_no_gguf_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deploy.groups.importable", lambda _name: True)
    with pytest.raises(UserError, match=r"vllm does not read the embedded model, .*: name a MODEL"):
        groups("--engine", "vllm")
    assert [group.model.remark for group in groups("--engine", "torch")] == ["the embedded model"]


def test_groups_have_common_values_and_their_own() -> None:
    first, second, third = groups(
        "m", "--threads", "2", "--engine-option", "length=1", "--served-model-name", "served",
        "--group", "scripted",
        "--group", "engine=scripted,threads=1,engine-option=step_ms=5,engine-option=length=2",
        "--group", "scripted,name=mine,num_shard=2",
    )  # fmt: skip
    assert [group.name for group in (first, second, third)] == ["scripted", "scripted-2", "mine"]
    assert {group.model.model_id for group in (first, second, third)} == {"served"}
    assert [group.workers.threads for group in (first, second, third)] == [2, 1, 2]
    assert [group.workers.world for group in (first, second, third)] == [1, 1, 2]
    assert first.workers.engine_options == third.workers.engine_options == ("length=1",)
    assert second.workers.engine_options == ("step_ms=5", "length=2")


def test_each_group_may_have_files_of_its_own_under_the_first_ones_name(tmp_path: Path) -> None:
    gguf = tmp_path / "tiny-Q8_0.gguf"
    gguf.touch()
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    first, second = groups("--group", f"llamacpp,model={gguf}", "--group", "scripted", str(folder))
    assert (first.model.path, second.model.path) == (gguf, folder)
    assert first.model.model_id == second.model.model_id == "tiny-Q8_0"


def test_a_config_file_has_the_options_names(tmp_path: Path) -> None:
    text = """
        model = "from-file"
        engine = "scripted"
        max-total-tokens = 400
        waiting_served_ratio = 0.5
        json-output = true
        adapter = []
        engine-option = { step_ms = 5, answer = "yes" }
        [[group]]
        num-shard = 2
        [[group]]
        name = "slow"
        engine_option = ["step_ms=50"]
    """
    given = options(*config(tmp_path, text))
    assert (given["max_total_tokens"], given["waiting_served_ratio"]) == (400, 0.5)
    assert given["json_output"] is True
    first, second = local_groups(given)
    assert (first.name, second.name) == ("scripted", "slow")
    assert first.model.model_id == "from-file"
    assert (first.workers.world, second.workers.world) == (2, 1)
    assert first.workers.engine_options == ("step_ms=5", "answer=yes")
    assert second.workers.engine_options == ("step_ms=50",)


def test_the_command_line_wins_over_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, "threads = 1\nmax-total-tokens = 100\nengine = 'scripted'\nport = 1")
    monkeypatch.setenv("THREADS", "2")
    monkeypatch.setenv("MAX_TOTAL_TOKENS", "200")
    given = options(*file, "--max-total-tokens", "300")
    assert (given["max_total_tokens"], given["threads"], given["port"]) == (300, 2, 1)
    assert given["engine"] == "scripted"
    monkeypatch.setenv("ROUNDHOUSE_CONFIG", file[1])
    assert options()["port"] == 1


def test_groups_of_the_command_line_take_the_place_of_those_in_the_file(tmp_path: Path) -> None:
    file = config(tmp_path, "[[group]]\nengine = 'scripted'\n[[group]]\nengine = 'scripted'")
    assert len(groups(*file)) == 2
    (group,) = groups(*file, "--group", "scripted,threads=3")
    assert group.workers.threads == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("thread = 1\nports = 2", "unknown keys: thread, ports; 'roundhouse serve --help' lists"),
        ("config = 'x'", "unknown keys: config"),
        ("help = true", "unknown keys: help"),
        ("threads = [1]", "threads must be a text, a number, true or false, not [1]"),
        ("threads = # how many?", "Invalid value (at line 1, column 11)"),
        ("threads = 'many'", "'many' is not a valid integer"),
        ("engine = 'abacus'", "'abacus' is not one of"),
        ("group = 3", "group must be tables, each headed [[group]]"),
        ("[[group]]\nthread = 1", "unknown key thread; there is name, model"),
        ("[[group]]\nport = 1", "unknown key port"),
        ("[[group]]\nthreads = 'x'", "threads: 'x' is not a valid integer"),
        ("[[group]]\nengine-option = [[1]]", "engine-option: must be a text, a number"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        options(*config(tmp_path, text))
    assert told in caught.value.format_message()
    assert "\n" not in caught.value.format_message()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match=r"config file .*none.toml: No such file"):
        options("--config", str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("group", "told"),
    [
        ("abacus", "engine: 'abacus' is not one of"),
        ("scripted,threads", "'threads' is not KEY=VALUE"),
        ("scripted,threads=-1", "threads: -1 is not in the range"),
        ("scripted,grpc-port=1", "unknown key grpc-port"),
        ("", "engine: '' is not one of"),
    ],
)
def test_a_mistake_in_a_group_is_one_line(group: str, told: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        options("--group", group)
    assert told in caught.value.format_message()


def test_two_groups_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two groups are called a; give each its own name="):
        groups("--group", "scripted,name=a", "--group", "scripted,name=a")


def test_auto_is_the_engine_that_fits_the_model_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(model: str | None, *, file: str | None, world: int) -> tuple[str, str]:
        asked.append((model, file, world))
        return "scripted", "scripted: nothing else is needed"

    (group,) = groups("--engine", "auto")
    assert group.workers.engine == "llamacpp"  # for the embedded model, with what is installed
    assert "llamacpp: " in group.model.remark
    monkeypatch.setattr("deploy.groups.choose", choose)
    first, second = groups(
        str(tmp_path), "--group", "auto,num-shard=2", "--group", "auto,file=Q8_0,model=other"
    )
    assert asked == [(str(tmp_path), None, 2), ("other", "Q8_0", 1)]
    assert (first.name, second.name) == ("scripted", "scripted-2")
    assert first.model.remark == "scripted: nothing else is needed"


def test_every_key_of_a_group_is_an_option() -> None:
    names = {param.name for param in command_of("serve").params}
    assert {key.replace("-", "_") for key in GROUP_KEYS} <= names


def test_an_engine_runs_in_its_own_environment_if_that_is_complete(tmp_path: Path) -> None:
    assert interpreter_of("torch") == sys.executable
    python = tmp_path / "home" / "engines" / "torch" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert interpreter_of("torch") == sys.executable  # it is still being installed
    (python.parent.parent / STAMP).touch()
    assert interpreter_of("torch") == str(python)
    assert interpreter_of("jax") == sys.executable
    (python.parent.parent.parent / "scripted").symlink_to(python.parent.parent)
    own, given = groups("--group", "scripted", "--group", "scripted,worker-python=/p")
    assert own.workers.interpreter == str(python).replace("torch", "scripted")
    assert given.workers.interpreter == "/p"


def test_a_worker_is_told_what_was_chosen_and_nothing_else() -> None:
    (group,) = groups(*SCRIPTED)
    told = worker_command(group.workers, group.model, "unix:///s", 0)
    assert told[1:] == [
        *("-P", "-m", "shards", "--model-id", "scripted", "--engine", "scripted"),
        *("--listen", "unix:///s", "--rank", "0", "--world", "1"),
    ]
    options = WorkerOptions("torch", 2, device="cpu", dtype="float32", adapters=("a=/b",))
    told = worker_command(options, group.model, "h:1", 1, "h:2")
    line = " ".join(told)
    assert "--world 2 --device cpu --dtype float32 --rendezvous h:2 --adapter a=/b" in line
    (group,) = groups(*SCRIPTED, "--graceful-termination-timeout", "7.5")
    told = worker_command(group.workers, group.model, "unix:///s", 0)
    assert told[-2:] == ["--graceful-termination-timeout", "7.5"]


def test_adapters_come_by_either_option(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    (group,) = groups(
        *SCRIPTED, "--adapter", f"a={tmp_path}/one",
        "--lora-adapters", f"b={tmp_path}/two, {tmp_path}/three",
    )  # fmt: skip
    three = f"{tmp_path}/three"
    assert group.workers.adapters == (
        f"a={tmp_path}/one", f"b={tmp_path}/two", f"{three}={three}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--adapter", "a"), "--adapter a is not NAME=PATH"),
        (("--adapter", "a=./no"), "adapter a: ./no does not exist"),
        (("--adapter", "a=.", "--lora-adapters", "a=."), "two adapters are called a"),
        (("--lora-adapters", "nowhere"), "adapter nowhere: nowhere does not exist"),
        (
            ("--adapter", "a=.", "--served-model-name", "a"),
            "an adapter is called a, as the model is: give it another name, or the model by "
            "--served-model-name",
        ),
    ],
)
def test_a_mistake_in_an_adapter_is_one_line(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError) as caught:
        groups(*SCRIPTED, *arguments)
    assert caught.value.message == told
