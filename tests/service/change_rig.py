"""Changes over groups and workers that behave as the real ones do, with gates and failures."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from router.change import ChangeError, Problem, Tell
from router.changing import Changes
from router.config import ConfigError, GroupSpec
from router.core.events import Limits
from router.fleet import GroupCard
from router.groups import RefusedError, State
from tests.service.fakes import PATIENCE_S, until

LIMIT_S = 7.0
"""How long a group may leave if a call does not say."""


def card_of(name: str, model: str) -> GroupCard:
    return GroupCard(
        name=name, model=model, engine="scripted", engine_version="1", device="cpu", dtype="f32",
        scheduling="caller", world=1, limits=Limits(1000, 1, 8, 64, 500, False), features=(),
        eos_token_ids=(0,), vocab_size=300, tokenizer_sha256="00", instances=(name,),
    )  # fmt: skip


def gate(*, is_open: bool = True) -> asyncio.Event:
    event = asyncio.Event()
    if is_open:
        event.set()
    return event


@dataclass
class Entry:
    spec: GroupSpec
    state: str = "down"
    card: GroupCard | None = None
    running: int = 0
    retired: bool = False


class FakeGroups:
    """Groups of a router without any connections. ``models`` is what workers say they serve."""

    def __init__(self, models: dict[str, str]) -> None:
        self.entries: dict[str, Entry] = {}
        self.models = models
        self.refusals: dict[str, str] = {}
        self.connecting = gate()
        self.emptied = gate()
        self.removals: list[tuple[str, float, bool]] = []
        self.waiting = 3
        self.broken = ""
        self.coming = False

    def serve(self, name: str) -> None:
        """A group that is up already."""
        self.add(GroupSpec(name, None, (f"unix:///{name}",)))
        self._up(name)

    def _up(self, name: str) -> None:
        entry = self.entries[name]
        entry.card, entry.state = card_of(name, self.models[name]), "up"

    def add(self, spec: GroupSpec) -> None:
        if spec.name in self.entries and not self.entries[spec.name].retired:
            raise ConfigError([f"two groups are called {spec.name}"])
        self.entries[spec.name] = Entry(spec)

    async def wait_up(self, name: str) -> None:
        await self.connecting.wait()
        if name == self.broken:
            raise ZeroDivisionError
        if name in self.refusals:
            raise RefusedError(self.refusals[name])
        self._up(name)

    async def remove(self, name: str, limit_s: float, *, at_once: bool = False) -> None:
        entry = self.entries[name]
        self.removals.append((name, limit_s, at_once))
        await self.retire(name, limit_s, at_once=at_once)
        if self.entries.get(name) is entry:
            del self.entries[name]

    async def retire(self, name: str, limit_s: float, *, at_once: bool = False) -> None:
        entry = self.entries[name]
        if entry.state == "up":
            assert limit_s > 0, "the step that is under way would be cut off"
            entry.state = "leaving"
            if not at_once:
                await self.emptied.wait()
        await asyncio.sleep(0)
        entry.state = "down"
        entry.retired = True

    @contextmanager
    def expecting(self) -> Iterator[None]:
        self.coming = True
        try:
            yield
        finally:
            self.coming = False

    def states(self) -> list[State]:
        return [
            State(one.spec, one.card, one.state, one.running, 1000, 0, 0)  # type: ignore[arg-type]
            for one in self.entries.values()
        ]

    def sole(self, name: str) -> str | None:
        up = [one for one in self.entries.values() if one.state == "up"]
        models = {one.spec.name: one.card.model for one in up if one.card is not None}
        model = models.pop(name, None)
        return None if model in models.values() else model

    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def up(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.state == "up"]


def fail(why: str | None) -> None:
    if why:
        raise ChangeError(Problem.IMPOSSIBLE, why)


@dataclass
class FakeWorkers:
    """Workers that are names. A gate holds up every start; errors are by the name of a group."""

    ends_them: bool = True
    running: set[str] = field(default_factory=set)
    began: list[str] = field(default_factory=list)
    downloaded: asyncio.Event = field(default_factory=gate)
    loading: asyncio.Event = field(default_factory=gate)
    ending: asyncio.Event = field(default_factory=gate)
    check_error: str = ""
    chatter: list[str] = field(default_factory=list)
    start_errors: dict[str, str] = field(default_factory=dict)
    again_errors: dict[str, str] = field(default_factory=dict)

    async def check(self, text: str, tell: Tell) -> None:
        await self.downloaded.wait()
        if self.check_error:
            raise ChangeError(Problem.INVALID, self.check_error)

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        return await self._start(text, tell, self.start_errors)

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        return await self._start(name, tell, self.again_errors)

    async def _start(self, name: str, tell: Tell, errors: dict[str, str]) -> GroupSpec:
        assert name not in self.running, "its device would be taken twice"
        self.began.append(name)
        self.running.add(name)
        try:
            tell(f"{name}: loading", 0.5)
            for line in self.chatter:
                tell(line, 0.5)
                await asyncio.sleep(0)
            await self.loading.wait()
            fail(errors.get(name))
        except BaseException:
            self.running.discard(name)
            raise
        return GroupSpec(name, None, (f"unix:///{name}",))

    async def end(self, name: str) -> None:
        await self.ending.wait()
        self.running.discard(name)


class Rig:
    """``lines`` is what the caller was told."""

    def __init__(self, tasks: asyncio.TaskGroup, names: tuple[str, ...]) -> None:
        self.groups = FakeGroups(dict.fromkeys((*names, "new"), "m") | {"other": "n"})
        self.workers = FakeWorkers(running=set(names))
        for name in names:
            self.groups.serve(name)
        self.lines: list[str] = []
        self.changes = Changes(
            self.groups,  # type: ignore[arg-type]
            self.workers,
            lambda work, name: tasks.create_task(work, name=name),
            LIMIT_S,
        )

    def tell(self, line: str, loaded: float) -> None:
        assert 0 <= loaded <= 1
        self.lines.append(line)

    async def refused(self, problem: Problem, change: Awaitable[None]) -> str:
        """The line of a change that is refused."""
        with pytest.raises(ChangeError) as caught:
            await change
        assert caught.value.problem is problem, caught.value
        return str(caught.value)

    @property
    def serving(self) -> tuple[list[str], list[str]]:
        """The groups that are up, in order, and those that have workers: the same ones."""
        return self.groups.up(), sorted(self.workers.running)


@asynccontextmanager
async def rig_of(*names: str) -> AsyncIterator[Rig]:
    """A router with these groups of one model. Its tasks end with it; none of them may fail."""
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        rig = Rig(tasks, names)
        try:
            yield rig
        finally:
            await rig.changes.close()


async def leave(change: Coroutine[Any, Any, None], rig: Rig, line: str) -> None:
    """A caller who leaves as soon as a line of that beginning has been told."""
    caller = asyncio.create_task(change)
    await until(lambda: any(told.startswith(line) for told in rig.lines))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def over(changes: Changes) -> None:
    """Waits until no change is under way."""
    await until(lambda: changes._line.now is None)
