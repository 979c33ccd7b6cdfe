"""The groups of worker processes on this machine: some from the start, others come and go.

Each is kept by a ``Keeper`` in a task that ``Supervisor.run`` owns: when that ends, so do all.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deploy.keeper import Keeper, News, StartError, WorkerSpec, to_the_end

# Pauses before a dead group is started again. One that lived long starts from the first.
RESTART_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
# How long a worker may take to leave when asked to, before it is killed.
LEAVE_S = 5.0

Hear = Callable[[News], None]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A group and the task that keeps it, whose result is why it could not start, if it could not.

    ``settled`` is set when it is ready for the first time, or gone; ``gone`` when nothing is left.
    """

    keeper: Keeper
    task: asyncio.Task[StartError | None]
    settled: asyncio.Event
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Owner of the worker processes of all groups, by name, each a list of its ranks in order.

    ``groups`` are those to begin with. ``news`` is called with all that a person may want to know.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[WorkerSpec]],
        news: Hear,
        pauses_s: Sequence[float] = RESTART_PAUSES_S,
        leave_s: float = LEAVE_S,
    ) -> None:
        self._first = dict(groups)
        self._news = news
        self._pauses_s = pauses_s
        self._leave_s = leave_s
        self._tasks = asyncio.TaskGroup()
        self._kept: dict[str, _Kept] = {}
        # Of the groups to begin with, those that have not been ready yet.
        self._awaited = set(groups)
        self._all_ready = asyncio.Event()

    async def all_ready(self) -> None:
        """Waits until every group to begin with has been ready. ``run`` raises if one cannot be."""
        if self._awaited:
            await self._all_ready.wait()

    async def run(self) -> None:
        """Keeps all groups alive until cancelled; ends them on the way out.

        Raises ``StartError`` when a worker of those to begin with ends before its group was ever
        ready.
        """
        try:
            async with self._tasks:
                for name, ranks in self._first.items():
                    self._begin(name, ranks, self._news, must_start=True)
                await asyncio.Event().wait()
        except ExceptionGroup as group_error:
            failed, others = group_error.split(StartError)
            if failed is None or others is not None:
                raise
            raise failed.exceptions[0] from None

    async def start(self, name: str, ranks: Sequence[WorkerSpec], hear: Hear) -> None:
        """Starts one more group while ``run`` runs; returns when all its ranks are ready.

        ``hear`` gets its news, too, until then. Raises ``StartError`` with a worker's own one line;
        then, and when it was cancelled, nothing is left of it. The others do not notice.
        """
        assert name not in self._kept, f"there is a group {name}"

        def news(one: News) -> None:
            self._news(one)
            if not kept.settled.is_set():
                hear(one)

        kept = self._begin(name, ranks, news)
        try:
            await kept.settled.wait()
        except asyncio.CancelledError:
            await self.end(name)
            raise
        if kept.gone.is_set():
            failure = None if kept.task.cancelled() else kept.task.result()
            raise failure or StartError(f"{name}: it was ended before it was ready")

    async def end(self, name: str) -> None:
        """Ends a group for good, whatever it is at; harmless if there is none.

        Its workers are asked to leave, and killed with all their children after a while. Goes on to
        its end if it is cancelled meanwhile.
        """
        if (kept := self._kept.get(name)) is not None:
            kept.task.cancel()
            self._settle(name)
            await to_the_end(kept.gone.wait())

    def replace(self, name: str, reason: str) -> None:
        """Kills the workers of a group, if it has any, unless they are loading; others then start.

        For workers that run and are of no use. ``reason`` takes the place of their last words.
        """
        if (kept := self._kept.get(name)) is not None:
            kept.keeper.replace(reason)

    def _begin(
        self, name: str, ranks: Sequence[WorkerSpec], news: Hear, *, must_start: bool = False
    ) -> _Kept:
        """Starts the task that keeps a group. Raises ``StartError`` if all are being ended."""
        settled = asyncio.Event()

        def ready() -> None:
            settled.set()
            self._settle(name)

        keeper = Keeper(ranks, news, ready, self._pauses_s, self._leave_s)
        keeping = _keep(keeper, must_start=must_start)
        try:
            task = self._tasks.create_task(keeping, name=f"workers of {name}")
        except RuntimeError as over:
            keeping.close()
            raise StartError(f"{name}: all workers are being ended") from over
        kept = self._kept[name] = _Kept(keeper, task, settled)
        task.add_done_callback(lambda _: self._forget(name))
        return kept

    def _forget(self, name: str) -> None:
        """A group's task is done: nothing is left of it."""
        kept = self._kept.pop(name)
        kept.gone.set()
        kept.settled.set()

    def _settle(self, name: str) -> None:
        """A group to begin with need no longer be waited for: it is ready, or has been ended."""
        self._awaited.discard(name)
        if not self._awaited:
            self._all_ready.set()


async def _keep(keeper: Keeper, *, must_start: bool) -> StartError | None:
    """Keeps a group until cancelled; raises, or returns, why it cannot start."""
    try:
        await keeper.keep()
    except StartError as error:
        if must_start:
            raise
        return error
    return None
