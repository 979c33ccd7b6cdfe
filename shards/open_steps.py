"""Steps that were started on the device and are not answered yet; the engine thread owns them.

While the host answers one, the device is at work on the next: two may be open at a time.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Queue
from typing import Generic, TypeVar

from shards.engines.base import STARTED_MAX, Engine, Outcome, Plan, PlanError, Started

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class _Open(Generic[_T]):
    """A step, and when it was started, in seconds of the monotonic clock."""

    job: _T
    started: Started
    began_s: float


class OpenSteps(Generic[_T]):
    """In the order of their starts. All methods are for the engine thread.

    ``answer`` takes a job, its outcome and the time that it took of the device, in microseconds.
    ``wake`` is called on another thread when the device is done with a step that is open.
    """

    def __init__(
        self, answer: Callable[[_T, Outcome, int], None], wake: Callable[[], None]
    ) -> None:
        self._answer = answer
        self._wake = wake
        self._steps: deque[_Open[_T]] = deque()
        self._finished_s = 0.0
        self._watched: Queue[Started | None] | None = None

    @property
    def began_s(self) -> float | None:
        """When the first one that is open was started; None if none is."""
        return self._steps[0].began_s if self._steps else None

    def start(self, engine: Engine, job: _T, plan: Plan) -> None:
        """Starts a step, and answers what is done by then.

        Raises ``PlanError`` once all before it are answered, and whatever makes the engine useless.
        """
        if len(self._steps) == STARTED_MAX:
            self._finish()
        began_s = time.monotonic()
        try:
            started = engine.start(plan)
        except PlanError:
            self.finish_all()
            raise
        step = _Open(job, started, began_s)
        self.finish_done()
        if not self._steps and started.done:
            self._tell(step)
            return
        self._steps.append(step)
        self._watch(started)

    def finish_done(self) -> None:
        """Answers the steps that need not be waited for. Raises as ``Started.finish``."""
        while self._steps and self._steps[0].started.done:
            self._finish()

    def finish_all(self) -> None:
        """Waits for all steps, and answers them. Raises as ``Started.finish``."""
        while self._steps:
            self._finish()

    def _finish(self) -> None:
        self._tell(self._steps.popleft())

    def _tell(self, step: _Open[_T]) -> None:
        outcome = step.started.finish()
        # Steps overlap on the host, not on the device.
        began_s, self._finished_s = max(step.began_s, self._finished_s), time.monotonic()
        self._answer(step.job, outcome, int((self._finished_s - began_s) * 1e6))

    # Waiting for the device ---------------------------------------------------------------------

    def _watch(self, started: Started) -> None:
        """Has a thread wait for a step; a daemon, as a device may never answer."""
        if self._watched is None:
            self._watched = Queue(STARTED_MAX + 1)
            run = threading.Thread(target=self._wait, args=(self._watched,), name="device")
            run.daemon = True
            run.start()
        self._watched.put(started)

    def _wait(self, watched: "Queue[Started | None]") -> None:
        while (started := watched.get()) is not None:
            with suppress(Exception):  # whatever it is, to finish the step raises it again
                started.wait()
            self._wake()

    def close(self) -> None:
        """Ends the thread once it need not wait any more."""
        if self._watched is not None:
            self._watched.put(None)
