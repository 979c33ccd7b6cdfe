"""Groups that come, go and take each other's place while requests run; one change at a time.

    add                  workers start ──► the router connects ──► it serves
    remove               no new requests ──► those there move or end ──► workers end
    switch               add, then remove of all others that serve the model
    switch, stop_first   the others end at once ──► add; if that fails they are started again

A change is a task of the router, not of the call that asks for it: when the caller leaves, a group
that does not serve yet is taken away again, and one that leaves goes on leaving. No failure of a
change is one of the router.
"""

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from functools import partial

from router.change import ChangeError, Problem, Tell, Workers
from router.group_steps import Limit, Steps, at_once, listed, model_of, shown
from router.groups import Groups, State
from router.under_way import Change, OneAtATime, Own, Work

log = logging.getLogger(__name__)

LIMIT_S_MAX = 31_536_000.0
CLOSING = "the server is shutting down"
DOWNLOADING = ": its files were not here; what is being downloaded goes on, so try again later"


class Changes:
    """Adds, removes and switches groups, one change at a time; a second one is refused at once.

    ``own`` owns the tasks. ``limit_s`` is for how many seconds requests may go on that no other
    group can take, if a call does not say.
    """

    def __init__(self, groups: Groups, workers: Workers, own: Own, limit_s: float) -> None:
        self._groups = groups
        self._workers = workers
        self._limit_s = limit_s
        self._steps = Steps(groups, workers)
        self._line = OneAtATime(own)
        self._taking = True

    # --- for users

    async def add(self, text: str, limit_s: float, tell: Tell) -> None:
        """Starts a group beside the others and waits until it serves.

        ``limit_s`` is how many seconds that may take, downloads included, 0: any. Raises
        ``ChangeError``; then nothing is left of it. Cancelled before it serves, it takes the group
        away again.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            limit = Limit(limit_s)
            await self._check(text, limit, tell)
            await self._steps.bring_up(change, text, limit, tell)

        await self._make(f"adding {shown(text)}", work)

    async def remove(self, name: str, limit_s: float, tell: Tell) -> None:
        """Takes a group away and ends its workers.

        ``limit_s`` is for how many seconds those requests may go on that no other group can take,
        0: as for every group. Raises ``ChangeError``. Cancelled, it goes on to its end.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            self._check_removable(name)
            change.hold()
            await self._steps.remove(name, limit_s or self._limit_s, tell)

        await self._make(f"removing {shown(name)}", work)

    async def switch(self, text: str, stop_first: bool, limit_s: float, tell: Tell) -> None:
        """Puts a new group in the place of all others that serve its model.

        ``limit_s`` is for the new group, as with ``add``. With ``stop_first`` the others are ended
        before it starts, and started again if it cannot serve. Raises ``ChangeError``; the others
        then serve on. Cancelled before the new group serves, everything is as it was.
        """
        _check_limit(limit_s)

        async def work(change: Change) -> None:
            limit = Limit(limit_s)
            await self._check(text, limit, tell)
            if stop_first:
                with self._groups.expecting():
                    await self._stop_and_switch(change, text, limit, tell)
            else:
                await self._switch(change, text, limit, tell)

        await self._make(f"switching to {shown(text)}", work)

    def states(self) -> list[State]:
        """How every group is."""
        return self._groups.states()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in any group."""
        return self._groups.waiting

    def take_no_more(self) -> None:
        """Refuses every further change; one that is under way goes on: requests may wait for it."""
        self._taking = False

    async def close(self) -> None:
        """Ends the change that is under way where it stands, and takes no more."""
        self.take_no_more()
        await self._line.close()

    async def _make(self, what: str, work: Work) -> None:
        """Makes a change, unless there is one. Raises ``ChangeError`` alone."""
        if not self._taking:
            raise ChangeError(Problem.IMPOSSIBLE, CLOSING)
        if self._line.now is not None:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                f"another change is under way: {self._line.now}; try again when it is done",
            )
        if not await self._line.do(what, partial(_guarded, work)):
            raise ChangeError(Problem.IMPOSSIBLE, CLOSING)

    # --- what stands against a change

    async def _check(self, text: str, limit: Limit, tell: Tell) -> None:
        """Has the description of a group looked at, and fetched what it needs, in that time."""
        async with limit.over(text, DOWNLOADING):
            await self._workers.check(text, tell)

    def _check_removable(self, name: str) -> None:
        """Raises ``ChangeError`` if there is no such group, or none that could stand in for it."""
        names = self._groups.names()
        if name not in names:
            raise ChangeError(
                Problem.UNKNOWN, f"no group is called {shown(name)}; there is: {listed(names)}"
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

    def _check_stoppable(self) -> tuple[tuple[str, ...], str]:
        """The groups and their one model. Raises ``ChangeError`` if they cannot be ended first."""
        states = self._groups.states()
        models = tuple(dict.fromkeys(filter(None, map(model_of, states))))
        if not self._workers.ends_them:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                "the workers of this router run elsewhere, where it cannot end them first: start "
                "the new ones beside them, or end them there",
            )
        if len(models) > 1:
            raise ChangeError(
                Problem.IMPOSSIBLE,
                f"there are several models, {listed(models)}: which of them the new group serves "
                "is not known before it is there",
            )
        return tuple(state.spec.name for state in states), (*models, "")[0]

    async def _check_place(self, new: State, models: Collection[str]) -> None:
        """Takes a new group away and raises ``ChangeError`` if no other serves its model."""
        if model_of(new) in models:
            return
        await self._steps.take_away(new.spec.name)
        raise ChangeError(
            Problem.IMPOSSIBLE,
            f"{new.spec.name} serves {model_of(new)}, and no other group does, so that it takes "
            f"nobody's place (models served: {listed(models)}); add it instead",
        )

    # --- one group in the place of others

    async def _switch(self, change: Change, text: str, limit: Limit, tell: Tell) -> None:
        """The new group first, so that there is always one that serves."""
        new = await self._steps.bring_up(change, text, limit, tell)
        others = [one for one in self._groups.states() if one.spec.name != new.spec.name]
        await self._check_place(new, dict.fromkeys(filter(None, map(model_of, others))))
        former = [one.spec.name for one in others if model_of(one) == model_of(new)]
        # All at once: requests must not move into a group that is the next to leave.
        await at_once(self._steps.remove(name, self._limit_s, tell) for name in former)
        tell(_in_place(new, former), 1.0)

    async def _stop_and_switch(self, change: Change, text: str, limit: Limit, tell: Tell) -> None:
        """The former groups stand down first, and come back if the new one cannot serve."""
        former, model = self._check_stoppable()
        change.hold()  # a group that is half gone is of no use to anybody
        try:
            tell(f"ending {listed(former)}; requests wait", 0.0)
            await at_once(map(self._steps.stand_down, former))
            await change.let_go()
            new = await self._steps.bring_up(change, text, limit, tell, former)
            if model:
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
        await at_once(self._steps.forget(name) for name in former if name != new.spec.name)
        tell(_in_place(new, former), 1.0)

    async def _restore(self, former: Sequence[str], tell: Tell) -> str:
        """Starts ended groups again; says in words which are back, and why others are not."""
        tell(f"starting the former groups again: {listed(former)}", 0.0)
        lost = await asyncio.gather(*(self._steps.come_back(name, tell) for name in former))
        back = [name for name, why in zip(former, lost, strict=True) if not why]
        said = [f"the former groups serve again: {listed(back)}"] if back else []
        return "; ".join([*said, *filter(None, lost)])


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


def _check_limit(limit_s: float) -> None:
    if not 0 <= limit_s <= LIMIT_S_MAX:  # NaN compares false
        raise ChangeError(
            Problem.INVALID,
            f"limit_s (seconds) must be from 0 to {LIMIT_S_MAX:,.0f}, not {limit_s:g}",
        )


def _in_place(new: State, former: Iterable[str]) -> str:
    return f"{new.spec.name} serves {model_of(new)} in the place of: {listed(former)}"
