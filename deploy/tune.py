"""Measures candidates one after the other, within a time, and remembers what it has measured."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.folders import folder_for_run
from deploy.tune_load import LoadError, Tally, measure
from deploy.tune_progress import Progress
from deploy.tune_report import config_text
from deploy.tune_search import FINALISTS, Candidate, Numbers, Result, Search, Shape
from deploy.tune_server import Served, ServerError, last_trouble, loaded_share, serving

# A window is long enough to average over some answers, and short enough to try much.
WINDOW_MIN_S, WINDOW_MAX_S = 5.0, 30.0
# Share of a candidate's time that is measured; the rest is loading and warming up.
WINDOW_SHARE = 0.4
WARM_SHARE = 0.25
LOAD_GUESS_S = 5.0
# The share of the time left that one candidate may take to load, and again until a token comes,
# while others wait for their turn: an engine that compiles for minutes must not keep the rest from
# being measured.
LOAD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tuned: the model as ``serve`` is told it, for which traffic, on which machine.

    ``name`` is the model's for people. ``identity`` tells the model's content from others of that
    name; ``versions`` has the version of every engine. ``others`` are the identities of the model's
    other copies, each by the path that a candidate has for it.
    """

    name: str
    model: str
    file: str
    identity: str
    machine: str
    shape: Shape
    versions: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def key(self, candidate: Candidate) -> str:
        """Names one measurement: the same key, the same numbers but for noise."""
        identity = self.others.get(candidate.model, self.identity)
        facts = [self.machine, identity, asdict(self.shape), str(candidate)]
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
    """Runs a search. ``results`` has what was measured so far."""

    subject: Subject
    search: Search
    memory: Memory
    minutes: float
    progress: Progress
    results: list[Result] = field(default_factory=list)
    _ends_at: float = 0.0

    async def run(self) -> list[Result]:
        """Measures until nothing is left to try or the time is up; the results, in that order."""
        self._ends_at = time.monotonic() + self.minutes * 60
        for candidate in self.search.following():
            result = await self._try(candidate)
            self.search.tell(result)
            self.results.append(result)
        for candidate in self.search.finalists():
            if not await self._decide(candidate):
                self.progress.say(
                    "the fastest are close; --minutes gives the time to tell them apart"
                )
                break
        return self.results

    async def _decide(self, candidate: Candidate) -> bool:
        """Measures one of the fastest again; what is known of it stays if that does not succeed.

        Says whether there was time for it.
        """
        place = next(n for n, one in enumerate(self.results) if one.candidate == candidate)
        known = self.results[place]
        assert known.numbers is not None, "finalists have been measured"
        again = await self._now(candidate, f"[once more, as it is close] {candidate}")
        if again.numbers is None:
            return not again.late
        numbers = known.numbers.and_again(again.numbers)
        self.memory.put(self.subject.key(candidate), numbers)
        self.results[place] = replace(again, numbers=numbers)
        self.search.tell(self.results[place])
        return True

    async def _try(self, candidate: Candidate) -> Result:
        """One candidate's result, remembered or measured."""
        key = self.subject.key(candidate)
        number = len(self.results) + 1
        place = f"[{number} of about {max(number, self.search.planned())}] {candidate}"
        if numbers := self.memory.get(key):
            self.progress.say(f"{place}: {numbers.tokens_s:.1f} tokens/s, measured before")
            return Result(candidate, numbers, cached=True)
        result = await self._now(candidate, place)
        if result.numbers:
            self.memory.put(key, result.numbers)
        return result

    async def _now(self, candidate: Candidate, place: str) -> Result:
        """One candidate's result, measured in what is left of the time."""
        left_s = self._left_s()
        if left_s < self._load_guess(candidate.engine) + WINDOW_MIN_S:
            return Result(candidate, problem="the time was up before its turn", late=True)
        try:
            async with asyncio.timeout(left_s):
                result = await self._measure(candidate, place)
        except TimeoutError:
            result = Result(candidate, problem="the time was up before it was measured", late=True)
        except OSError as error:
            result = Result(candidate, problem=_line(error))
        if not result.numbers:
            self.progress.say(f"{place}: {result.problem}")
        return result

    async def _measure(self, candidate: Candidate, place: str) -> Result:
        """Starts a server, loads it with the traffic, and ends it."""
        with folder_for_run() as folder:
            config, log = folder / "candidate.toml", folder / "server.log"
            config.write_text(config_text(self.subject, candidate))
            try:
                async with self._loaded(config, log, place) as served:
                    numbers = await self._under_load(served, place)
            except _SlowError as error:
                return Result(candidate, problem=_line(error), late=True)
            except ServerError as error:
                return Result(candidate, problem=_line(error))
            except LoadError as error:
                # What clients saw follows from what befell the server.
                return Result(candidate, problem=last_trouble(log) or _line(error))
            return Result(candidate, numbers, load_s=served.load_s)

    @asynccontextmanager
    async def _loaded(self, config: Path, log: Path, place: str) -> AsyncIterator[Served]:
        """A server that is ready. Raises ``_SlowError`` if it takes too much of the time left."""
        self.progress.say(f"{place}: loading ...")
        limit_s = self._share_s()
        async with AsyncExitStack() as stack:
            try:
                async with (
                    self.progress.during(lambda: " ".join(("loading", *loaded_share(log)))),
                    asyncio.timeout(limit_s),
                ):
                    served = await stack.enter_async_context(serving(config, log))
            except TimeoutError:
                raise _SlowError(
                    f"not ready after {limit_s:.0f} s, which was its share of the time;"
                    " --minutes gives more"
                ) from None
            yield served

    async def _under_load(self, served: Served, place: str) -> Numbers:
        """What is measured under the traffic."""
        window_s, tally = self._window(), Tally()
        self.progress.say(
            f"{place}: loaded in {served.load_s:.0f} s, measuring {window_s:.0f} s ..."
        )
        async with self.progress.during(tally.words):
            numbers = await measure(
                served.address,
                self.subject.shape,
                window_s * WARM_SHARE,
                window_s,
                patience_s=max(window_s, self._share_s()),
                tally=tally,
            )
        self.progress.say(f"{place}: {numbers.tokens_s:.1f} tokens/s")
        return replace(numbers, dtype=served.dtype)

    def _turns(self) -> int:
        """How many measurements are to come, about: this one, others, and those that decide."""
        following = self.search.planned() - len(self.results)
        if following <= 0:
            return max(1, len(self.search.finalists()))
        return following + (FINALISTS if len(self.results) + following > 1 else 0)

    def _left_s(self) -> float:
        return self._ends_at - time.monotonic()

    def _share_s(self) -> float:
        """How long a candidate may take to load, and until a token comes.

        All the time that is left if it is the last one, or else a part of it.
        """
        last = self.search.planned() - len(self.results) <= 1
        return max(0.0, self._left_s() - WINDOW_MIN_S) * (1.0 if last else LOAD_SHARE)

    def _window(self) -> float:
        """How long the next measurement may last, so that the rest gets its turn."""
        share_s = self._left_s() / self._turns() * WINDOW_SHARE
        return min(WINDOW_MAX_S, max(WINDOW_MIN_S, share_s))

    def _load_guess(self, engine: str) -> float:
        """How long an engine takes to load, from the times that it was loaded for a measurement."""
        known = [one.load_s for one in self.results if one.candidate.engine == engine]
        return max(known, default=0.0) or LOAD_GUESS_S


class _SlowError(Exception):
    """A candidate took more of the time for loading than it may."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def unfinished(results: Iterable[Result]) -> bool:
    """Whether there was too little time for something."""
    return any(result.late for result in results)
