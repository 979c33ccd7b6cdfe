"""Work that somebody asks for, done by a task of the router: one at a time, and to a good end.

The caller waits for it and may leave. Then what can be taken back is, by cancelling the task, and
what cannot goes on without a caller.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

log = logging.getLogger(__name__)

Own = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
"""Starts a task of that name, whose failure ends the router; ``Router.own``."""


class Change:
    """One piece of work that is under way: what it is, in words, its task, and how it failed."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.task: asyncio.Task[None] | None = None
        self.error: Exception | None = None
        self._left = False
        self._held = False

    def leave(self) -> None:
        """Nobody waits for it any more: it is taken back, if it can be."""
        self._left = True
        if not self._held and self.task is not None:
            self.task.cancel()

    def hold(self) -> None:
        """From here on it goes on, whoever leaves."""
        self._held = True

    async def let_go(self) -> None:
        """From here on it can be taken back again; it is if the caller has left meanwhile."""
        self._held = False
        if self._left:
            self.leave()
            await asyncio.sleep(0)  # where the cancellation arrives


Work: TypeAlias = Callable[[Change], Coroutine[Any, Any, None]]


class OneAtATime:
    """``own`` owns the tasks. No failure of the work is one of its task."""

    def __init__(self, own: Own) -> None:
        self._own = own
        self._now: Change | None = None
        self.closed = False

    @property
    def now(self) -> str | None:
        """What is under way, in words."""
        return None if self._now is None else self._now.what

    async def do(self, what: str, work: Work) -> bool:
        """Does the work, and raises what it raises. Returns whether it came to its own end.

        There must be none under way, and ``close`` not called.
        """
        assert self._now is None
        assert not self.closed
        change = Change(what)
        task = change.task = self._own(self._keep(change, work), what)
        self._now = change
        task.add_done_callback(self._done)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            change.leave()
            raise
        if change.error is not None:
            raise change.error
        return not task.cancelled()

    async def close(self) -> None:
        """Ends the work that is under way where it stands; there is to be no more."""
        self.closed = True
        if self._now is not None and self._now.task is not None:
            self._now.task.cancel()
            await asyncio.wait((self._now.task,))

    def _done(self, _: asyncio.Task[None]) -> None:
        self._now = None

    async def _keep(self, change: Change, work: Work) -> None:
        log.info("%s", change.what)
        try:
            await work(change)
        except asyncio.CancelledError:
            why = "the server shuts down" if self.closed else "whoever asked for it has left"
            log.warning("%s: given up, as %s", change.what, why)
            raise
        except Exception as error:  # noqa: BLE001 - the caller gets it
            log.warning("%s: failed: %s", change.what, error)
            change.error = error
        else:
            log.info("%s: done", change.what)
