"""What the driver drives: the core that decides, and the groups that its effects reach."""

from typing import Protocol

from router.core.effects import Abandon, Effect, Left, RunPlan
from router.core.events import Event
from router.core.snapshot import Snapshot


class Scheduler(Protocol):
    """What the driver drives: ``router.core.scheduler.Core``, or a script in its place."""

    def observe(self, now_ms: int, event: Event) -> list[Effect]:
        """Records one thing that has happened."""

    def plan(self, now_ms: int) -> list[Effect]:
        """Decides all that can be decided now."""

    def wake_at(self) -> int | None:
        """The instant at which ``plan`` is due even if nothing happens, or None."""

    def snapshot(self) -> Snapshot:
        """The state in numbers."""


class Workers(Protocol):
    """One group, as far as effects reach it. No method waits."""

    def write(self, plan: RunPlan) -> None:
        """Sends a plan to every rank; ignores one of a former epoch."""

    def abandon(self, effect: Abandon) -> None:
        """Ends the streams of this epoch and starts a new one."""

    def left(self, effect: Left) -> None:
        """Ends the streams of this epoch, in which nothing runs any more."""
