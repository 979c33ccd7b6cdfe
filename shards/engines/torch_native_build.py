"""Compiles ``torch_native.cpp`` by whichever C++ compiler the machine has, and keeps the result.

It takes a second or two, once: the next start finds it in the user's own cache
(``~/.cache/roundhouse/torch``), under a name that depends on all that it was made of.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from shards.engines.omp_cores import openmp_path

SOURCE = Path(__file__).with_name("torch_native.cpp")
HEADERS = tuple(SOURCE.with_name(f"torch_native_{part}.h") for part in ("numbers", "attention"))
COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-w"),
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")),
    "-mfma",
)
_COMPILING_S = 120
_REASON_MAX = 200


class BuildError(Exception):
    """Why there are no kernels, in one line."""


@cache
def library() -> ctypes.CDLL:
    """The kernels. Raises ``BuildError``."""
    openmp = openmp_path()
    if openmp is None:
        raise BuildError("torch's OpenMP library is not found")
    compiler = _compiler()
    texts = (path.read_text() for path in (SOURCE, *HEADERS))
    made_of = (*texts, *_FLAGS, _run([compiler, "--version"]), str(openmp))
    name = f"native-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:24]}.so"
    folder = cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as passing:
            return _open(_compile(compiler, openmp, Path(passing) / name))
    path = folder / name
    if path.exists():
        with suppress(BuildError):  # what a full disk has left of it, for one
            return _open(path)
    return _open(_compile(compiler, openmp, path))


def _compiler() -> str:
    wanted = os.environ.get("CXX", "")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(f"there is no C++ compiler ({wanted or ' or '.join(COMPILERS)})")


def cache_folder() -> Path | None:
    """Where what was compiled is kept, if only this user writes there: what is found is run."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    folder = Path(base) / "roundhouse" / "torch"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.getuid() and not others and os.access(folder, os.W_OK):
            return folder
    return None


def _compile(compiler: str, openmp: Path, path: Path) -> Path:
    """Compiles to ``path``, which is there as a whole or not at all.

    It is linked to torch's own OpenMP, as a second one would have threads of its own.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as passing:
        compiled, linked = Path(passing) / "native.o", Path(passing) / path.name
        _run([compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), str(openmp), "-o", str(linked)])
        linked.replace(path)
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILING_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}"[:_REASON_MAX]) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [""]
        raise BuildError(f"{command[0]} failed: {lines[0]}"[:_REASON_MAX])
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(str(error)[:_REASON_MAX]) from error
