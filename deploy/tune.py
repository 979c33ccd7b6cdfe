"""Measures candidates one after the other, within a time, and remembers what it has measured."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.tune_load import LoadError, measure
from deploy.tune_report import config_text
from deploy.tune_search import Candidate, Numbers, Result, Search, Shape
from deploy.tune_server import ServerError, serving

# A window is long enough to average over some answers, and short enough to try much.
WINDOW_MIN_S, WINDOW_MAX_S = 5.0, 30.0
# Share of a candidate's time that is measured; the rest is loading and warming up.
WINDOW_SHARE = 0.4
WARM_SHARE = 0.25
LOAD_GUESS_S = 5.0


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tuned: the model as ``serve`` is told it, for which traffic, on which machine.

    ``name`` is the model's for people. ``identity`` tells the model's content from others of that
    name; ``versions`` has the version of every engine.
    """

    name: str
    model: str
    file: str
    identity: str
    machine: str
    shape: Shape
    versions: dict[str, str] = field(default_factory=dict)

    def key(self, candidate: Candidate) -> str:
        """Names one measurement: the same key, the same numbers but for noise."""
        facts = [self.machine, self.identity, asdict(self.shape), str(candidate)]
        return json.dumps([*facts, self.versions.get(candidate.engine, "")])


class Memory:
    """Measurements in a JSON file, written anew after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        self._known: dict[str, Any] = found if isinstance(found, dict) else {}

    def get(self, key: str) -> Numbers | None:
        """What was measured under this key, if it was."""
        try:
            return Numbers(**self._known[key])
        except (KeyError, TypeError):
            return None

    def put(self, key: str, numbers: Numbers) -> None:
        """Remembers it, on disk."""
        self._known[key] = asdict(numbers)
        partial = self._path.with_name(f"{self._path.name}.new")
        partial.write_text(json.dumps(self._known, indent=1))
        partial.replace(self._path)


@dataclass(slots=True)
class Tuner:
    """Runs a search. ``tell`` gets lines of progress. ``results`` has what was measured so far."""

    subject: Subject
    search: Search
    memory: Memory
    minutes: float
    tell: Callable[[str], None]
    results: list[Result] = field(default_factory=list)
    _ends_at: float = 0.0

    async def run(self) -> list[Result]:
        """Measures until nothing is left to try or the time is up; the results, in that order."""
        self._ends_at = time.monotonic() + self.minutes * 60
        for candidate in self.search.following():
            result = await self._try(candidate)
            self.search.tell(result)
            self.results.append(result)
        return self.results

    async def _try(self, candidate: Candidate) -> Result:
        """One candidate's result, remembered or measured."""
        key = self.subject.key(candidate)
        place = f"[{len(self.results) + 1} of about {self.search.planned()}] {candidate}"
        if numbers := self.memory.get(key):
            self.tell(f"{place}: {numbers.tokens_s:.1f} tokens/s, measured before")
            return Result(candidate, numbers, cached=True)
        left_s = self._ends_at - time.monotonic()
        if left_s < self._load_guess(candidate.engine) + WINDOW_MIN_S:
            return Result(candidate, problem="the time was up before its turn")
        try:
            async with asyncio.timeout(left_s):
                result = await self._measure(candidate, place)
        except TimeoutError:
            result = Result(candidate, problem="the time was up before it was measured")
        except (ServerError, LoadError, OSError) as error:
            result = Result(candidate, problem=" ".join(str(error).split()))
        if result.numbers:
            self.memory.put(key, result.numbers)
        else:
            self.tell(f"{place}: {result.problem}")
        return result

    async def _measure(self, candidate: Candidate, place: str) -> Result:
        """Starts a server, loads it with the traffic, and ends it."""
        with tempfile.TemporaryDirectory(prefix="roundhouse-tune-") as folder:
            config, log = Path(folder) / "candidate.toml", Path(folder) / "server.log"
            config.write_text(config_text(self.subject, candidate))
            self.tell(f"{place}: loading ...")
            async with serving(config, log) as served:
                window_s = self._window()
                self.tell(
                    f"{place}: loaded in {served.load_s:.0f} s, measuring {window_s:.0f} s ..."
                )
                warm_s = window_s * WARM_SHARE
                numbers = await measure(served.address, self.subject.shape, warm_s, window_s)
                self.tell(f"{place}: {numbers.tokens_s:.1f} tokens/s")
                return Result(candidate, numbers, load_s=served.load_s)

    def _window(self) -> float:
        """How long the next measurement may last, so that the rest gets its turn."""
        turns = max(1, self.search.planned() - len(self.results))
        share_s = (self._ends_at - time.monotonic()) / turns * WINDOW_SHARE
        return min(WINDOW_MAX_S, max(WINDOW_MIN_S, share_s))

    def _load_guess(self, engine: str) -> float:
        """How long an engine takes to load, from the times that it was loaded for a measurement."""
        known = [one.load_s for one in self.results if one.candidate.engine == engine]
        return max(known, default=0.0) or LOAD_GUESS_S


def unfinished(results: Iterable[Result]) -> bool:
    """Whether the time was up before everything had its turn."""
    return any(result.problem.startswith("the time was up") for result in results)
