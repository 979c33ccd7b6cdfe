"""Loads a damaged copy of the core, from memory, and lets the simulation look for the damage.

Nothing on disk changes: the copy's modules live under a name of their own, and only as long as they
are needed. Events and effects are shared with the original, so that both speak of the same things.
"""

import importlib.util
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

from router.core.scheduler import Core
from tests.sim.simulation import Simulation

CORE = Path(__file__).resolve().parents[2] / "router" / "core"
WORLD_CPU_S_MAX = 2.0
_COPY = "damaged_core"
_SHARED = ("events", "effects")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One damage: in ``file``, ``old`` becomes ``new``; ``why`` says what it breaks."""

    file: str
    old: str
    new: str
    why: str


class Hang(Exception):
    """A world took longer than any sound one."""


class _Loader(SourceLoader):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def get_filename(self, fullname: str) -> str:
        return str(CORE / f"{fullname.partition('.')[2] or '__init__'}.py")

    def get_data(self, path: str) -> bytes:
        text = Path(path).read_text()
        if Path(path).name == self._mutant.file:
            text = damaged(self._mutant, text)
        kept = "|".join(_SHARED)
        return re.sub(rf"from router\.core\.(?!{kept})", f"from {_COPY}.", text).encode()


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] != _COPY:
            return None
        return importlib.util.spec_from_loader(
            fullname, _Loader(self._mutant), is_package=fullname == _COPY
        )


def damaged(mutant: Mutant, text: str) -> str:
    """The text with the damage; an error if it does not say exactly where that is."""
    found = text.count(mutant.old)
    if found != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {found} times, not once")
    return text.replace(mutant.old, mutant.new)


@contextmanager
def damaged_core(mutant: Mutant) -> Iterator[type[Core]]:
    """The ``Core`` of a damaged copy."""
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        core: type[Core] = importlib.import_module(f"{_COPY}.scheduler").Core
        yield core
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == _COPY]:
            del sys.modules[name]


@contextmanager
def limited(cpu_s: float) -> Iterator[None]:
    """Raises ``Hang`` inside the block once it has used so much processor time."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Hang(f"no end within {cpu_s} s")

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def hunt(mutant: Mutant, seeds: range) -> tuple[int, str] | None:
    """The first seed whose world shows the damage, and how it shows; None if none does."""
    with damaged_core(mutant) as core:
        for seed in seeds:
            try:
                with limited(WORLD_CPU_S_MAX):
                    Simulation(seed, core).run()
            except Exception as error:  # noqa: BLE001 - damaged code may fail in any way
                return seed, f"{type(error).__name__}: {error}"
    return None
