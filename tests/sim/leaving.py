"""Groups that are told to go: when, and what must hold of them and of what ran there."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Protocol

from router.core.effects import Close, Effect, Left
from router.core.events import Event, GroupDown, GroupGone, GroupLeaving, Reason
from router.core.scheduler import Core
from tests.sim.books import Books
from tests.sim.checks import has_room
from tests.sim.turn import Turn
from tests.sim.worker import ensure
from tests.sim.world import World, draw_limits


def add_spares(rng: Random, world: World) -> None:
    """One or two groups more, in some worlds."""
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        like = rng.choice(world.groups)
        limits = draw_limits(rng, like.limits.page_tokens, like.limits.kv_tokens)
        world.groups.append(replace(like, name=f"g{len(world.groups)}", limits=limits))


class Clockwork(Protocol):
    """The simulation, as far as this part of it needs it."""

    core: Core
    books: Books
    world: World
    seen: Counter[str]
    faults_on: bool

    def at(self, delay_ms: int, handler: Callable[..., None], *arguments: object) -> None:
        """Calls the handler after that time."""

    def observe(self, event: Event) -> list[Effect]:
        """Lets the core observe an event."""

    def perform(self, effects: list[Effect]) -> None:
        """Performs what the core asked for."""

    def restart(self, name: str) -> None:
        """Lets a group come up again, some time later."""


class Leaving:
    """Tells groups to leave, and lets them come again when they have left."""

    def __init__(self, sim: Clockwork, rng: Random) -> None:
        """Gives some worlds more groups, too, for what leaves the others."""
        self._sim = sim
        self._rng = rng
        add_spares(rng, sim.world)

    def schedule(self) -> None:
        """Draws who is told to leave, when, and whether at once."""
        rate = self._rng.choice((0.0, 0.4, 0.7, 0.9))
        rate = 0.8 if self._sim.world.uneven else rate
        for spec in self._sim.world.groups:
            while self._rng.random() < rate:
                delay_ms = self._rng.randrange(self._sim.world.spread_ms + 300)
                at_once, returns = self._rng.random() < 0.3, self._rng.random() < 0.5
                self._sim.at(delay_ms, self._leave, spec.name, at_once, returns)

    def left(self, left: Left) -> None:
        """The core says that a group may go: it goes soon."""
        self._sim.at(self._rng.randrange(20), self._gone, left)

    def told_late(self, name: str, epoch: int) -> None:
        """A group that is lost was also told to leave, of which the core hears too late."""
        self._sim.at(self._rng.randrange(60), self._old, name, epoch)

    def down(self, name: str) -> None:
        """A group is down. Of some one hears that they will not come up again."""
        if self._rng.random() < 0.2:
            self._sim.at(self._rng.randrange(20), self._gone_for_good, name)

    def _gone_for_good(self, name: str) -> None:
        if name in self._sim.books.groups:
            return
        self._sim.seen["gone for good"] += 1
        self._sim.books.away.pop(name, None)
        ensure(self._sim.observe(GroupGone(name)) == [], "news of a group has effects")

    def _leave(self, name: str, at_once: bool, returns: bool) -> None:
        sim, books = self._sim, self._sim.books
        group = books.groups.get(name)
        if group is None or not sim.faults_on:
            return
        sim.seen["leaving again"] += group.leaving
        group.leaving, group.returns = True, returns
        for request in books.open.values():
            bound = request.tokens and not books.config.resume_streams
            if at_once and bound and request.home is group:
                books.due[request.id] = Reason.WORKER_LOST
        effects = sim.observe(GroupLeaving(name, group.worker.epoch, at_once, returns))
        note_moves(books, sim.core, effects)
        sim.perform(effects)
        stays = any(request.home is group for request in books.open.values())
        ensure(not (at_once and stays), "somebody stays in a group that goes at once")

    def _gone(self, left: Left) -> None:
        """Its streams have ended, unless it was lost meanwhile."""
        group = self._sim.books.groups.get(left.group)
        if group is None or group.worker.epoch != left.epoch:
            return
        self._sim.seen["left"] += 1
        self._sim.books.went(group)
        effects = self._sim.observe(GroupDown(left.group, left.epoch))
        ensure(effects == [], "somebody misses a group that has left")
        self._sim.restart(left.group)

    def _old(self, name: str, epoch: int) -> None:
        self._sim.seen["old leaving"] += name in self._sim.books.groups
        effects = self._sim.observe(GroupLeaving(name, epoch, at_once=True))
        ensure(effects == [], "an old GroupLeaving has effects")


def note_moves(
    books: Books, core: Core, effects: Sequence[Effect], preempted: bool = False
) -> None:
    """Notes who has moved out of a group that is leaving, before ``effects`` are performed.

    And once more behind them: one may have been admitted, and moved since. If somebody was
    ``preempted`` meanwhile, those who moved cannot be told from those.
    """
    closed = {effect.request for effect in effects if isinstance(effect, Close)}
    for request in books.open.values():
        if request.home is None or not request.home.leaving or request.id in closed:
            continue
        place, former = core._live[request.id].group, core._groups.get(request.home.name)
        if former is None or place is former:
            continue  # it is lost, or stays
        if preempted:
            request.home = None
        else:
            books.moved_on(request, place is not None)


def check_leaving(books: Books, core: Core, before: Turn, effects: Sequence[Effect]) -> None:
    """After a turn: nobody comes, whoever can go has gone, and who is empty has said so."""
    preempted = core.counters.preempted > before.preempted
    note_moves(books, core, (), preempted)
    if preempted:
        books.moved = core.counters.moved
    ensure(core.counters.moved == books.moved, "moves are miscounted")
    told = {effect.group for effect in effects if isinstance(effect, Left)}
    for name, book in books.groups.items():
        group = core._groups[name]
        ensure(group.leaving == book.leaving, f"{name} is leaving, or not")
        empty = not (group.running or group.drops or book.in_flight)
        ensure(name not in told or (book.leaving and empty), f"{name} has not left")
        ensure(group.left == (book.leaving and empty), f"{name} may go, and is not told")
        if not book.leaving:
            continue
        for member in (*group.decoding.values(), *group.filling.values()):
            ensure(before.places.get(member.id) is group, f"{member.id} was placed where all leave")
            request = books.requests[member.id]
            if request.home is book and request.tokens and not books.config.resume_streams:
                books.seen["ends where it is"] += 1
                continue
            for other in books.serving(request.model):
                room = other.able(request) and has_room(
                    books, other, core._groups[other.name], request
                )
                ensure(not room, f"{request.id} could have moved to {other.name}")
