"""The groups that the router is connected to: they come, and go, while it runs.

    add ──► connecting, again and again ──► up, down, up ... ──remove──► leaving ──► forgotten

Removing drains: what runs in the group moves to others as they have room (``router.core.leaving``).
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

from router.config import ConfigError, GroupSpec, Settings, check_groups
from router.core.events import GroupGone
from router.core.snapshot import GroupSnapshot, Snapshot
from router.driver import Driver
from router.fleet import Fleet, GroupCard, MismatchError
from router.group import Group
from router.link import Link
from router.metrics import Metrics
from router.under_way import Own
from tls.identity import Identity


class RefusedError(Exception):
    """A group cannot serve, or not beside the others; the text is one line that says why."""


@dataclass(frozen=True, slots=True)
class State:
    """One group. ``card`` is what it last said of itself, if it has ever come up.

    ``running`` counts sequences; the others are tokens: of its whole KV cache, held or reserved by
    what runs, and kept to be shared.
    """

    spec: GroupSpec
    card: GroupCard | None
    state: Literal["down", "up", "leaving"]
    running: int
    kv_tokens: int
    kv_used: int
    kv_cached: int


class Groups:
    """Owner of the groups and their tasks. ``snapshot`` gives the numbers of the core.

    ``silent`` is called with the name of a group whose workers hang. ``cluster`` is by what router
    and workers know each other over TCP.
    """

    def __init__(  # noqa: PLR0913 - all that groups have to do with meets here
        self,
        specs: Iterable[GroupSpec],
        *,
        driver: Driver,
        fleet: Fleet,
        metrics: Metrics,
        settings: Settings,
        snapshot: Callable[[], Snapshot],
        own: Own,
        silent: Callable[[str], None] = lambda _: None,
        cluster: Identity | None = None,
    ) -> None:
        self._driver = driver
        self._fleet = fleet
        self._metrics = metrics
        self._dial = partial(Link, slots=settings.plans_in_flight_max + 2, cluster=cluster)
        self._trial_s = settings.step_deadline_s
        self._expecting_s = settings.resume_timeout_s
        self._snapshot = snapshot
        self._own = own
        self._silent = silent
        self._epochs = count(1)
        self._groups: dict[str, Group] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        for spec in specs:
            self._attach(spec)

    # --- for the router

    def start(self) -> None:
        """Begins to connect those that were there from the beginning."""
        for name in self._groups:
            self._start(name)

    def cancel(self) -> None:
        """Ends all connections; whoever owns the tasks waits for them."""
        for task in self._tasks.values():
            task.cancel()

    async def wait_first(self) -> None:
        """Waits until one of them serves. Raises ``ConfigError`` if none of them can."""
        waits = {asyncio.ensure_future(_refusal_of(group)) for group in self._groups.values()}
        refusals = []
        try:
            for settled in asyncio.as_completed(waits):
                if not (refusal := await settled):
                    return
                refusals.append(refusal)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        raise ConfigError(refusals)

    # --- for whoever changes them

    def add(self, spec: GroupSpec) -> None:
        """Begins to connect a further group, or one in the place of a retired one of its name.

        It is tried out before it serves: others may be taken away in its favour.
        Raises ``ConfigError`` if its name or one of its addresses is taken or malformed.
        """
        former = self._tasks.get(spec.name)
        retired = former is not None and former.done()
        others = (
            one.spec for name, one in self._groups.items() if name != spec.name or not retired
        )
        check_groups([*others, spec])
        if retired:
            self._driver.detach(spec.name)
        self._fleet.add(spec)
        self._attach(spec)
        self._groups[spec.name].try_first(self._trial_s)
        self._start(spec.name)

    async def wait_up(self, name: str) -> None:
        """Waits until a group serves. The caller sets the deadline.

        Raises ``RefusedError`` if it cannot serve, or has been removed.
        """
        group = self._groups.get(name)
        if group is None:
            raise RefusedError(f"group {name} has been removed")
        try:
            await group.wait_up()
        except MismatchError as error:
            raise RefusedError(str(error)) from None

    async def remove(self, name: str, limit_s: float, *, at_once: bool = False) -> None:
        """Takes a group away: it gets no more requests, and goes when the last has left it.

        Those that no other group can take may go on there for ``limit_s`` seconds; what is left
        starts again elsewhere, as after a loss. ``at_once``: all of it waits for a place elsewhere
        instead. Cancelled, the group goes on leaving. Raises ``KeyError`` if there is none.
        """
        task = self._tasks[name]
        await self._retire(name, limit_s, at_once=at_once, returns=False)
        if self._tasks.get(name) is task:  # another call may have been as fast
            del self._groups[name], self._tasks[name]
            self._driver.detach(name)
            self._driver.post(GroupGone(name))
            self._fleet.forget(name)
            self._metrics.batches.forget(name)

    async def retire(self, name: str, limit_s: float, *, at_once: bool = False) -> None:
        """Ends a group as ``remove`` does, and goes on to know it, as one that is down.

        So requests for its model are taken, and wait. ``add`` may put another in its place.
        """
        await self._retire(name, limit_s, at_once=at_once, returns=True)

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Within, groups are ended for one that is coming; requests wait, so the router is healthy.

        It is for as long as answers that have begun wait: ``resume_timeout_s``.
        """
        loop = asyncio.get_running_loop()
        self._fleet.expect(True)
        given_up = loop.call_later(self._expecting_s, self._fleet.expect, False)
        try:
            yield
        finally:
            given_up.cancel()
            self._fleet.expect(False)

    async def _retire(self, name: str, limit_s: float, *, at_once: bool, returns: bool) -> None:
        group, task = self._groups[name], self._tasks[name]
        if group.retire(at_once=at_once, returns=returns):
            await asyncio.wait((task,), timeout=limit_s)
        task.cancel()
        await asyncio.wait((task,))

    # --- for whoever wants to know

    def names(self) -> tuple[str, ...]:
        """Those that are there, whatever their state."""
        return tuple(self._groups)

    def sole(self, name: str) -> str | None:
        """The model that only this group serves now, if there is one."""
        serving = {
            one.spec.name: one.card.model
            for one in self.states()
            if one.state == "up" and one.card is not None
        }
        model = serving.pop(name, None)
        return None if model in serving.values() else model

    def states(self) -> list[State]:
        """How each of them is."""
        shots = {shot.name: shot for shot in self._snapshot().groups}
        return [
            self._state(spec, card, shots.get(spec.name)) for spec, card in self._fleet.groups()
        ]

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in any of them."""
        return self._snapshot().waiting

    def _state(self, spec: GroupSpec, card: GroupCard | None, shot: GroupSnapshot | None) -> State:
        """The core hears of a group in its next turn: until then nothing runs there."""
        if card is None or not card.ready:
            return State(spec, card, "down", 0, 0, 0, 0)
        word: Literal["up", "leaving"] = "leaving" if self._groups[spec.name].leaving else "up"
        if shot is None:
            return State(spec, card, word, 0, card.limits.kv_tokens, 0, 0)
        return State(spec, card, word, shot.running, shot.kv_total, shot.kv_used, shot.kv_donors)

    def _attach(self, spec: GroupSpec) -> None:
        group = self._groups[spec.name] = Group(
            spec,
            inbox=self._driver,
            fleet=self._fleet,
            metrics=self._metrics,
            epochs=lambda: next(self._epochs),
            dial=self._dial,
            silent=self._silent,
        )
        self._driver.attach(spec.name, group)

    def _start(self, name: str) -> None:
        self._tasks[name] = self._own(self._groups[name].run(), f"group {name}")


async def _refusal_of(group: Group) -> str:
    """Waits until a group serves, or cannot; returns why it cannot, or nothing."""
    try:
        await group.wait_up()
    except MismatchError as error:
        return f"group {group.spec.name} cannot serve: {error}"
    return ""
