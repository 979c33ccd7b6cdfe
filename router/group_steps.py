"""The steps of which changes of groups are made: workers started, connected, left, ended.

Each either comes to its end or leaves nothing behind; ``router.changing`` puts them together.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

from router.change import ChangeError, Problem, Tell, Workers
from router.config import ConfigError, GroupSpec
from router.groups import Groups, RefusedError, State
from router.under_way import Change

log = logging.getLogger(__name__)

AT_ONCE_S = 10.0
"""What the step may take that a group computes while all that runs there is sent back into line."""
COME_BACK_S = 1800.0
"""What a group that has served before may take to do so again."""
LOOK_S = 1.0
"""How often one hears how many sequences are left in a group that leaves."""
SHOWN_MAX = 200
"""Characters that are repeated of what somebody has written."""


class Limit:
    """How long a new group may take until it serves, from now on. ``seconds`` of 0: any time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = asyncio.get_running_loop().time() + seconds if seconds else None

    @asynccontextmanager
    async def over(self, text: str, more: str = "") -> AsyncIterator[None]:
        """Ends what is within when the time is over. Raises ``ChangeError`` that says so.

        ``text`` is the group's, and ``more`` what there is to say of what was ended.
        """
        try:
            async with asyncio.timeout_at(self._until) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            late = f"{shown(text)} did not serve within {self._seconds:g} s{more}"
            raise ChangeError(Problem.IMPOSSIBLE, late) from None


class Steps:
    """What can be done with one group, of the router and of whoever has its workers."""

    def __init__(self, groups: Groups, workers: Workers) -> None:
        self._groups = groups
        self._workers = workers

    async def bring_up(
        self, change: Change, text: str, limit: Limit, tell: Tell, former: Collection[str] = ()
    ) -> State:
        """Starts a group and waits until it serves. Failed or taken back, it leaves nothing.

        From then on the change goes on, whoever leaves. ``former`` have stood down: it may take the
        name of one of them, and leaves that behind as it was.
        """
        spec: GroupSpec | None = None
        joined = False
        try:
            async with limit.over(text):
                spec = await self._workers.start(text, tell)
                self._join(spec)
                joined = True
                await self._wait_up(spec, tell)
        except BaseException:
            change.hold()
            if spec is not None and spec.name in former:
                await self.stand_down(spec.name)
            elif spec is not None:
                await (self.take_away if joined else self._workers.end)(spec.name)
            raise
        change.hold()
        state = self.find(spec.name)
        assert state is not None, "a group that serves is known"
        tell(serving(state), 1.0)
        return state

    async def take_away(self, name: str) -> None:
        """Removes a group at once, and its workers; what runs there waits for another."""
        await self.forget(name)
        await self._workers.end(name)

    async def forget(self, name: str) -> None:
        """Removes a group at once from the router, if it is there."""
        with suppress(KeyError):
            await self._groups.remove(name, AT_ONCE_S, at_once=True)

    async def stand_down(self, name: str) -> None:
        """Ends a group and its workers. The router knows it still, so that requests wait for it."""
        with suppress(KeyError):
            await self._groups.retire(name, AT_ONCE_S, at_once=True)
        await self._workers.end(name)

    async def come_back(self, name: str, tell: Tell) -> str:
        """Starts a group that has stood down again. Returns why it does not serve, or nothing."""
        why = "the log says why"
        try:
            async with asyncio.timeout(COME_BACK_S):
                await self.stand_down(name)  # if a failure has come between
                spec = await self._workers.start_again(name, tell)
                self._join(spec)
                await self._wait_up(spec, tell)
        except TimeoutError:
            why = f"it took more than {COME_BACK_S:g} s"
        except ChangeError as error:
            why = str(error)
        except Exception:
            log.exception("group %s has not come back", name)
        else:
            return ""
        await self.take_away(name)
        return f"{name} has not come back: {why}"

    async def remove(self, name: str, limit_s: float, tell: Tell) -> None:
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

    def find(self, name: str) -> State | None:
        """How a group is, if it is there."""
        return next((one for one in self._groups.states() if one.spec.name == name), None)

    def _join(self, spec: GroupSpec) -> None:
        """Lets the router connect to a group."""
        try:
            self._groups.add(spec)
        except ConfigError as error:
            raise ChangeError(Problem.INVALID, str(error)) from None

    async def _wait_up(self, spec: GroupSpec, tell: Tell) -> None:
        tell(f"{spec.name}: its workers have loaded, connecting", 1.0)
        try:
            await self._groups.wait_up(spec.name)
        except RefusedError as error:
            raise ChangeError(Problem.IMPOSSIBLE, f"{spec.name} cannot serve: {error}") from None

    async def _tell_running(self, name: str, tell: Tell) -> None:
        """Says how many sequences run in a group that leaves, whenever that has changed."""
        last = -1
        while (state := self.find(name)) is not None:
            if state.running != last:
                last = state.running
                tell(f"{name} takes no more requests; sequences that run there: {last}", 0.0)
            await asyncio.sleep(LOOK_S)


async def at_once(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of it at once, to its end; then raises the first failure, if there is one."""
    for end in await asyncio.gather(*works, return_exceptions=True):
        if end is not None:
            raise end


def model_of(state: State) -> str:
    """The model that a group serves, as far as is known."""
    return state.card.model if state.card is not None else state.spec.model or ""


def serving(state: State) -> str:
    """What a group serves, and how."""
    how = f": {state.card.engine} on {state.card.device}" if state.card is not None else ""
    return f"{state.spec.name} serves {model_of(state)}{how}"


def shown(text: str) -> str:
    """What somebody has written, fit for a line."""
    return "".join(filter(str.isprintable, text))[:SHOWN_MAX] or "''"


def listed(names: Iterable[str]) -> str:
    """Names in a line."""
    return ", ".join(names) or "none"
