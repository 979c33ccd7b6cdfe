"""Compiles kernels of our own by whichever C++ compiler the machine has, and keeps the result.

It takes some seconds, once: the next start finds it in the user's own cache
(``~/.cache/roundhouse``, a folder for each engine), under a name that depends on all that it was
made of. What engines have in common is in ``native_*.h``.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-w"),
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")),
    "-mfma",
)
_COMPILING_S = 120
_REASON_MAX = 200


class BuildError(Exception):
    """Why there are no kernels, in one line."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What an engine's kernels are made of: a file, flags of the compiler, what is linked.

    ``versions`` are of whatever else it includes.
    """

    engine: str
    source: Path
    flags: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def library(self) -> ctypes.CDLL:
        """The kernels, compiled if need be. Raises ``BuildError``."""
        compiler = _compiler()
        headers = sorted(HERE.glob("native_*.h"))
        texts = (path.read_text() for path in (self.source, *headers))
        flags = (*_FLAGS, *self.flags, *self.linked)
        made_of = (*texts, *flags, *self.versions, _run([compiler, "--version"]))
        name = f"native-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:24]}.so"
        folder = cache_folder(self.engine)
        if folder is None:
            with tempfile.TemporaryDirectory() as passing:
                return _open(_compile(compiler, self, Path(passing) / name))
        path = folder / name
        if path.exists():
            with suppress(BuildError):  # what a full disk has left of it, for one
                return _open(path)
        return _open(_compile(compiler, self, path))


def _compiler() -> str:
    wanted = os.environ.get("CXX", "")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise BuildError(f"there is no C++ compiler ({wanted or ' or '.join(COMPILERS)})")


def cache_folder(engine: str) -> Path | None:
    """Where what was compiled is kept, if only this user writes there: what is found is run."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    folder = Path(base) / "roundhouse" / engine
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if found.st_uid == os.getuid() and not others and os.access(folder, os.W_OK):
            return folder
    return None


def _compile(compiler: str, kernels: Kernels, path: Path) -> Path:
    """Compiles to ``path``, which is there as a whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as passing:
        compiled, linked = Path(passing) / "native.o", Path(passing) / path.name
        flags = (*_FLAGS, *kernels.flags)
        _run([compiler, *flags, "-c", str(kernels.source), "-o", str(compiled)])
        _run([compiler, "-shared", str(compiled), *kernels.linked, "-o", str(linked)])
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
