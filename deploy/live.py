"""Groups of workers on this machine that come and go while the server runs.

A description becomes engine and files, beside the event loop: they may have to be downloaded. Then
a worker is started for each rank, on a socket that no other has had.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from deploy.console import Console, line_of
from deploy.further import FurtherGroups
from deploy.groups import LocalGroup
from deploy.keeper import Loading, News, Ready, StartError
from deploy.options import UserError
from deploy.ranks import group_spec, worker_specs
from deploy.supervisor import Supervisor
from router.change import ChangeError, Problem, Tell
from router.config import GroupSpec

T = TypeVar("T")


class LocalWorkers:
    """The workers of groups on this machine: ``router.change.Workers``.

    ``groups`` are those that the supervisor has had from the beginning, on sockets in ``folder``
    whose places are their own; ``further`` makes others of texts.
    """

    ends_them = True

    def __init__(
        self,
        supervisor: Supervisor,
        groups: Sequence[LocalGroup],
        further: FurtherGroups,
        folder: Path,
        console: Console,
    ) -> None:
        self._supervisor = supervisor
        self._groups = {group.name: group for group in groups}
        self._further = further
        self._folder = folder
        self._console = console
        self._places = count(len(groups))
        # What was looked at last, of which text: between a check and the start nothing has changed.
        self._checked: tuple[str, LocalGroup] | None = None
        # The last two groups of each name that were ended, and the last that a text has asked for:
        # it may have the name of one that it was to replace, and is not the one to come back.
        self._ended: dict[str, deque[LocalGroup]] = {}
        self._newest: LocalGroup | None = None

    async def check(self, text: str, tell: Tell) -> None:
        """Looks at the description of a group, and fetches what it needs if that is not here.

        So nobody waits for that who waits for a group that is to be ended first. Raises
        ``ChangeError``. Cancelled, a download goes on by itself.
        """
        group = await self._find(self._parse(text), tell)
        self._checked = text, group

    async def start(self, text: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a new group; returns when all are ready.

        It serves the model of the first group, and gets a name that no other has. Raises
        ``ChangeError`` with one line. Failed or cancelled, it leaves nothing behind.
        """
        self._newest = None
        own, checked = self._parse(text), self._checked
        self._checked = None
        if checked is not None and checked[0] == text:
            group = checked[1]
        else:
            group = await self._find(own, tell)
        self._newest = group = replace(group, name=self._free_name(group, own))
        return await self._start(group, tell)

    async def end(self, name: str) -> None:
        """Ends the workers of a group, for good. Does nothing if there are none."""
        try:
            await self._supervisor.end(name)
        finally:  # they have ended also when this was cancelled meanwhile
            if (group := self._groups.pop(name, None)) is not None:
                self._ended.setdefault(name, deque(maxlen=2)).append(group)
                self._console.ended(group)

    async def start_again(self, name: str, tell: Tell) -> GroupSpec:
        """Starts the workers of a group that was ended, as they were; otherwise as ``start``."""
        await self.end(name)
        former = [group for group in self._ended.get(name, ()) if group is not self._newest]
        if not former:
            raise ChangeError(Problem.UNKNOWN, f"no group that was called {name} has been ended")
        return await self._start(former[-1], tell)

    def _parse(self, text: str) -> dict[str, Any]:
        """The values of a description. Raises ``ChangeError``."""
        try:
            return self._further.parse(text)
        except UserError as error:
            raise ChangeError(Problem.INVALID, _line(error)) from error

    async def _find(self, own: Mapping[str, Any], tell: Tell) -> LocalGroup:
        """The group of such values, whose files are here. Raises ``ChangeError``."""
        tell("looking for the engine and the files of the model", 0.0)
        try:
            return await _aside(lambda: self._further.find(own))
        except (UserError, OSError) as error:
            raise ChangeError(Problem.IMPOSSIBLE, _line(error)) from error

    def _free_name(self, group: LocalGroup, own: Mapping[str, Any]) -> str:
        """The name that was asked for, or one after the engine. Raises ``ChangeError``."""
        if group.name not in self._groups:
            return group.name
        if own.get("name"):
            raise ChangeError(
                Problem.IMPOSSIBLE, f"there is a group {group.name}; give this one another name=..."
            )
        names = (f"{group.name}-{number}" for number in count(2))
        return next(name for name in names if name not in self._groups)

    async def _start(self, group: LocalGroup, tell: Tell) -> GroupSpec:
        """Starts the workers of a group on new sockets. Raises ``ChangeError``."""
        ranks = worker_specs(group, self._folder, next(self._places), group.name)
        self._console.starting(group)
        tell(f"{group.name}: starting its workers", 0.0)
        try:
            await self._supervisor.start(group.name, ranks, _Telling(group, tell))
        except BaseException as failure:
            self._console.ended(group)
            if isinstance(failure, StartError):
                raise ChangeError(Problem.IMPOSSIBLE, _line(failure)) from failure
            raise
        self._groups[group.name] = group
        return group_spec(group, ranks)


class _Telling:
    """Passes on the news of a group that loads, with how far all its ranks are."""

    def __init__(self, group: LocalGroup, tell: Tell) -> None:
        self._name = group.name
        self._world = group.workers.world
        self._tell = tell
        self._loaded: dict[str, float] = {}

    def __call__(self, news: News) -> None:
        match news:
            case Loading(worker, fraction):
                self._loaded[worker] = fraction
                line = f"{self._name}: loading"
            case Ready(worker):
                self._loaded[worker] = 1.0
                line = line_of(news)
            case _:
                line = line_of(news)
        self._tell(line, sum(self._loaded.values()) / self._world)


async def _aside(work: Callable[[], T]) -> T:
    """Does work that blocks in a thread that nobody has to wait for; cancelled, it goes on there.

    At its end a process waits for the threads of ``asyncio.to_thread``, and a download may take an
    hour.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # nobody can take it back from the thread

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            outcome.set_exception(error)

    threading.Thread(target=run, name="group", daemon=True).start()
    return await asyncio.wrap_future(outcome)


def _line(error: Exception) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split())
