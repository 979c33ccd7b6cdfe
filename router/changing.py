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
from collections.abc import Callable, Coroutine
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

from router.config import GroupSpec

if TYPE_CHECKING:
    from router.groups import Groups, State

Tell = Callable[[str, float], None]
"""Takes a line for a person, and how far the workers are with loading: 0 to 1, 0 if not known.

Never waits and never fails.
"""
Own = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts a task of that name and sees to its end; ``Router.own``."""


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

    async def check(self, text: str) -> None:
        """Looks at the description of a group as far as that is cheap. Raises ``ChangeError``."""

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

    def __init__(self, groups: "Groups", workers: Workers, own: Own, limit_s: float) -> None:
        self._groups = groups
        self._workers = workers
        self._own = own
        self._limit_s = limit_s
        self._closed = False

    async def add(self, text: str, limit_s: float, tell: Tell) -> None:
        """Starts a group beside the others and waits until it serves.

        ``limit_s`` is how many seconds that may take, 0: any. Raises ``ChangeError``; then nothing
        is left of it. Cancelled before it serves, it takes the group away again.
        """
        raise NotImplementedError

    async def remove(self, name: str, limit_s: float, tell: Tell) -> None:
        """Takes a group away and ends its workers.

        ``limit_s`` is for how many seconds those requests may go on that no other group can take,
        0: as for every group. Raises ``ChangeError``. Cancelled, it goes on to its end.
        """
        raise NotImplementedError

    async def switch(self, text: str, stop_first: bool, limit_s: float, tell: Tell) -> None:
        """Puts a new group in the place of all others that serve its model.

        ``limit_s`` is for the new group, as with ``add``. With ``stop_first`` the others are ended
        before it starts, and started again if it cannot serve. Raises ``ChangeError``; the others
        then serve on. Cancelled before the new group serves, everything is as it was.
        """
        raise NotImplementedError

    def states(self) -> "list[State]":
        """How every group is."""
        return self._groups.states()

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in any group."""
        return self._groups.waiting

    async def close(self) -> None:
        """Ends the change that is under way where it stands, and takes no more."""
        self._closed = True
