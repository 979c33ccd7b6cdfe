"""Groups that come, go and take each other's place while requests run; one change at a time.

    add                  workers start ──► the router connects ──► it serves
    remove               no new requests ──► those there move or end ──► workers end
    switch               add, then remove of all others that serve the model
    switch, stop_first   the others end at once ──► add; if that fails they are started again

A change is a task of the router, not of the call that asks for it: when the caller leaves, a group
that does not serve yet is taken away again, and one that leaves goes on leaving. No failure of a
change is one of the router.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import suppress
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from router.config import ConfigError, GroupSpec
from router.under_way import Change, OneAtATime, Own, Work

if TYPE_CHECKING:
    from router.groups import Groups, State

log = logging.getLogger(__name__)

LIMIT_S_MAX = 31_536_000.0
COME_BACK_S = 1800.0
"""What a group that has served before may take to do so again."""
LOOK_S = 1.0
"""How often one hears how many sequences are left in a group that leaves."""
SHOWN_MAX = 200
"""Characters that are repeated of what somebody has written."""
CLOSING = "the server is shutting down"

Tell = Callable[[str, float], None]
"""Takes a line for a person, and how far the workers are with loading: 0 to 1, 0 if not known.

Never waits and never fails.
"""


class Problem(Enum):
    """Why a change is refused: what was asked for, a name nobody has, or the state of things."""

    INVALID = auto()
    UNKNOWN = auto()
    IMPOSSIBLE = auto()


class ChangeError(Exception):
    """A change that was refused or failed. The text is one line that says why."""

    def __init__(self, problem: Problem, line: str) -> None:
        super().__init__(line)
        self.problem = problem


class Workers(Protocol):
    """Who has the workers of groups: others, elsewhere, or processes on this machine.

    ``ends_them`` says which: whether ``end`` frees the devices that a group computes on, and
    ``start_again`` brings it back.
    """

    ends_them: bool

    async def check(self, text: str, tell: Tell) -> None:
        """Looks at the description of a group, and fetches what it needs, before anything changes.

        Raises ``ChangeError``.
        """

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a new group, which ``AddGroupRequest.group`` describes.

        Returns when they listen and have loaded. Raises ``ChangeError`` with the worker's own line
        if they cannot. Failed or cancelled, it leaves nothing behind.
        """

    async def end(self, name: str) -> None:
        """Ends the workers of a group, for good. Does nothing if there are none."""

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a group that was ended, as they were; otherwise as ``start``."""


class Changes:
    """Adds, removes and switches groups, one change at a time; a second one is refused at once.

    ``own`` owns the tasks. ``limit_s`` is for how many seconds requests may go on that no other
    group can take, if a call does not say.
    """

    def __init__(self, groups: Groups, workers: Workers, own: Own, limit_s: float) -> None:
        self._groups = groups
        self._workers = workers
        self._limit_s = limit_s
        self._line = OneAtATime(own)

    # --- for users

    async def add(self, text: str, limit_s: float, tell: Tell) -> None:
        """Starts a group beside the others and waits until it serves.

        ``limit_s`` is how many seconds that may take, 0: any. Raises ``ChangeError``; then nothing
        is left of it. Cancelled before it serves, it takes the group away again.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            await self._workers.check(text, tell)
            await self._bring_up(change, text, limit_s, tell)

        await self._make(f"adding {_shown(text)}", work)

    async def remove(self, name: str, limit_s: float, tell: Tell) -> None:
        """Takes a group away and ends its workers.

        ``limit_s`` is for how many seconds those requests may go on that no other group can take,
        0: as for every group. Raises ``ChangeError``. Cancelled, it goes on to its end.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            self._check_removable(name)
            change.hold()
            await self._remove(name, limit_s or self._limit_s, tell)

        await self._make(f"removing {_shown(name)}", work)

    async def switch(self, text: str, stop_first: bool, limit_s: float, tell: Tell) -> None:
        """Puts a new group in the place of all others that serve its model.

        ``limit_s`` is for the new group, as with ``add``. With ``stop_first`` the others are ended
        before it starts, and started again if it cannot serve. Raises ``ChangeError``; the others
        then serve on. Cancelled before the new group serves, everything is as it was.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            await self._workers.check(text, tell)
            if stop_first:
                await self._stop_and_switch(change, text, limit_s, tell)
            else:
                await self._switch(change, text, limit_s, tell)

        await self._make(f"switching to {_shown(text)}", work)

    def states(self) -> list[State]:
        """How every group is."""
        return self._groups.states()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in any group."""
        return self._groups.waiting

    async def close(self) -> None:
        """Ends the change that is under way where it stands, and takes no more."""
        await self._line.close()

    async def _make(self, what: str, work: Work) -> None:
        """Makes a change, unless there is one. Raises ``ChangeError`` alone."""
        if self._line.closed:
            raise ChangeError(Problem.IMPOSSIBLE, CLOSING)
        if self._line.now is not None:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                f"another change is under way: {self._line.now}; try again when it is done",
            )
        if not await self._line.do(what, partial(_guarded, work)):
            raise ChangeError(Problem.IMPOSSIBLE, CLOSING)

    # --- what changes are made of

    async def _bring_up(self, change: Change, text: str, limit_s: float, tell: Tell) -> State:
        """Starts a group and waits until it serves. Failed or taken back, it leaves nothing.

        From then on the change goes on, whoever leaves.
        """
        spec: GroupSpec | None = None
        try:
            async with asyncio.timeout(limit_s or None) as limit:
                spec = await self._workers.start(text, tell)
                await self._connect(spec, tell)
        except BaseException as failure:
            change.hold()
            if spec is not None:
                await self._take_away(spec.name)
            if isinstance(failure, TimeoutError) and limit.expired():
                late = f"{_shown(text)} did not serve within {limit_s:g} s"
                raise ChangeError(Problem.IMPOSSIBLE, late) from None
            raise
        change.hold()
        state = self._find(spec.name)
        assert state is not None, "a group that serves is known"
        tell(_serving(state), 1.0)
        return state

    async def _connect(self, spec: GroupSpec, tell: Tell) -> None:
        """Connects the router to a group and waits until it serves."""
        from router.groups import RefusedError

        try:
            self._groups.add(spec)
            tell(f"{spec.name}: its workers have loaded, connecting", 1.0)
            await self._groups.wait_up(spec.name)
        except ConfigError as error:
            raise ChangeError(Problem.INVALID, str(error)) from None
        except RefusedError as error:
            raise ChangeError(Problem.IMPOSSIBLE, f"{spec.name} cannot serve: {error}") from None

    async def _take_away(self, name: str) -> None:
        """Removes a group at once, and its workers; what runs there waits for another."""
        with suppress(KeyError):  # the router never got to know it, or does not any more
            await self._groups.remove(name, 0, at_once=True)
        await self._workers.end(name)

    def _check_removable(self, name: str) -> None:
        """Raises ``ChangeError`` if there is no such group, or none that could stand in for it."""
        names = self._groups.names()
        if name not in names:
            raise ChangeError(
                Problem.UNKNOWN, f"no group is called {_shown(name)}; there is: {_listed(names)}"
            )
        model = self._groups.sole(name)
        if model is not None:
            only = f"{name} is the only group that serves {model} now"
        elif len(names) == 1:
            only = f"{name} is the only group"
        else:
            return
        raise ChangeError(
            Problem.IMPOSSIBLE, f"{only}: add another one first, or switch to one in its place"
        )

    async def _remove(self, name: str, limit_s: float, tell: Tell) -> None:
        """Removes a group and its workers, and says how many sequences are left there."""
        telling = asyncio.create_task(self._tell_running(name, tell))
        try:
            with suppress(KeyError):  # it has gone meanwhile, which is what was wanted
                await self._groups.remove(name, limit_s)
        finally:
            telling.cancel()
            await asyncio.wait((telling,))
        await self._workers.end(name)
        tell(f"{name} has been removed", 0.0)

    async def _tell_running(self, name: str, tell: Tell) -> None:
        """Says how many sequences run in a group that leaves, whenever that has changed."""
        last = -1
        while (state := self._find(name)) is not None:
            if state.running != last:
                last = state.running
                tell(f"{name} takes no more requests; sequences that run there: {last}", 0.0)
            await asyncio.sleep(LOOK_S)

    # --- one group in the place of others

    async def _switch(self, change: Change, text: str, limit_s: float, tell: Tell) -> None:
        """The new group first, so that there is always one that serves."""
        new = await self._bring_up(change, text, limit_s, tell)
        others = [one for one in self._groups.states() if one.spec.name != new.spec.name]
        await self._check_place(new, dict.fromkeys(filter(None, map(_model, others))))
        former = [one.spec.name for one in others if _model(one) == _model(new)]
        # All at once: requests must not move into a group that is the next to leave.
        await _all(self._remove(name, self._limit_s, tell) for name in former)
        tell(_in_place(new, former), 1.0)

    async def _check_place(self, new: State, models: Collection[str]) -> None:
        """Takes a new group away and raises ``ChangeError`` if no other serves its model."""
        if _model(new) in models:
            return
        await self._take_away(new.spec.name)
        raise ChangeError(
            Problem.IMPOSSIBLE,
            f"{new.spec.name} serves {_model(new)}, and no other group does, so that it takes "
            f"nobody's place (models served: {_listed(models)}); add it instead",
        )

    async def _stop_and_switch(self, change: Change, text: str, limit_s: float, tell: Tell) -> None:
        """The former groups leave first, and come back if the new one cannot serve."""
        former, model = self._check_stoppable()
        change.hold()  # a group that is half gone is of no use to anybody
        try:
            tell(f"ending {_listed(former)}; requests wait", 0.0)
            await _all(map(self._take_away, former))
            await change.let_go()
            new = await self._bring_up(change, text, limit_s, tell)
            if former:
                await self._check_place(new, (model,))
        except BaseException as failure:
            if self._line.closed or not former:
                raise
            change.hold()
            told = await self._restore(former, tell)
            if isinstance(failure, Exception):
                known = _known(failure, change.what)
                raise ChangeError(known.problem, f"{known}; {told}") from None
            log.warning("%s", told)
            raise
        tell(_in_place(new, former), 1.0)

    def _check_stoppable(self) -> tuple[tuple[str, ...], str]:
        """The groups and their one model. Raises ``ChangeError`` if they cannot be ended first."""
        states = self._groups.states()
        models = tuple(dict.fromkeys(filter(None, map(_model, states))))
        if not self._workers.ends_them:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                "the workers of this router run elsewhere, where it cannot end them first: start "
                "the new ones beside them, or end them there",
            )
        if len(models) > 1:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                f"there are several models, {_listed(models)}: which of them the new group serves "
                "is not known before it is there",
            )
        return tuple(state.spec.name for state in states), (*models, "")[0]

    async def _restore(self, former: Sequence[str], tell: Tell) -> str:
        """Starts ended groups again; says in words which are back, and why others are not."""
        tell(f"starting the former groups again: {', '.join(former)}", 0.0)
        lost = await asyncio.gather(*(self._come_back(name, tell) for name in former))
        back = [name for name, why in zip(former, lost, strict=True) if not why]
        said = [f"the former groups serve again: {', '.join(back)}"] if back else []
        return "; ".join([*said, *filter(None, lost)])

    async def _come_back(self, name: str, tell: Tell) -> str:
        """Starts one group again. Returns why it does not serve, or nothing."""
        try:
            if name in self._groups.names():  # a failure has come between
                await self._take_away(name)
            async with asyncio.timeout(COME_BACK_S):
                await self._connect(await self._workers.start_again(name, tell), tell)
        except TimeoutError:
            return f"{name} has not come back within {COME_BACK_S:g} s"
        except ChangeError as error:
            return f"{name} has not come back: {error}"
        except Exception:
            log.exception("group %s has not come back", name)
            return f"{name} has not come back; the log says why"
        return ""

    def _find(self, name: str) -> State | None:
        return next((one for one in self._groups.states() if one.spec.name == name), None)


async def _guarded(work: Work, change: Change) -> None:
    """Does the work of a change. Raises ``ChangeError`` alone."""
    try:
        await work(change)
    except Exception as error:  # noqa: BLE001 - becomes a ChangeError
        raise _known(error, change.what) from None


def _known(error: Exception, what: str) -> ChangeError:
    """What to tell the caller. A failure that nobody has thought of is logged in full."""
    if isinstance(error, ChangeError):
        return error
    log.error("%s", what, exc_info=error)
    return ChangeError(Problem.IMPOSSIBLE, "the router failed; its log says why")


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of it at once, to its end; then raises the first failure, if there is one."""
    for end in await asyncio.gather(*works, return_exceptions=True):
        if end is not None:
            raise end


def _check_limit(limit_s: float) -> None:
    if not 0 <= limit_s <= LIMIT_S_MAX:  # NaN compares false
        raise ChangeError(
            Problem.INVALID,
            f"limit_s (seconds) must be from 0 to {LIMIT_S_MAX:,.0f}, not {limit_s:g}",
        )


def _shown(text: str) -> str:
    """What somebody has written, fit for a line."""
    return "".join(filter(str.isprintable, text))[:SHOWN_MAX] or "''"


def _model(state: State) -> str:
    """The model that a group serves, as far as is known."""
    return state.card.model if state.card is not None else state.spec.model or ""


def _serving(state: State) -> str:
    """What a group serves, and how."""
    how = f": {state.card.engine} on {state.card.device}" if state.card is not None else ""
    return f"{state.spec.name} serves {_model(state)}{how}"


def _in_place(new: State, former: Iterable[str]) -> str:
    return f"{new.spec.name} serves {_model(new)} in the place of: {_listed(former)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
