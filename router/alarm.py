"""The driver's one timer, for an instant that moves on with every answer of a group.

To set a timer anew for each step would cost more than to look again when it goes off too early.
"""

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls ``ring`` when the instant that was set last has come, by a clock of milliseconds."""

    def __init__(self, clock: Callable[[], int], ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._due_ms: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0

    def set(self, due_ms: int | None) -> None:
        """The instant that counts from now on, if there is one."""
        self._due_ms = due_ms
        if due_ms is None or (self._timer is not None and self._timer_ms <= due_ms):
            return
        self.stop()
        self._timer_ms = due_ms
        delay_s = max(0, due_ms - self._clock()) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def stop(self) -> None:
        """Rings no more, until it is set again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def late_ms(self, now_ms: int) -> int:
        """For how long the instant is past; negative before it, and if there is none."""
        return -1 if self._due_ms is None else now_ms - self._due_ms

    def _look(self) -> None:
        self._timer = None
        if self.late_ms(self._clock()) >= 0:
            self._ring()
        else:
            self.set(self._due_ms)
