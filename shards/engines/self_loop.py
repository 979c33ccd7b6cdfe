"""An event loop on a thread of its own, for an engine that lives on one."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Generic, TypeVar

_T = TypeVar("_T")
SWEEP_S = 5.0


class LoopThread(Generic[_T]):
    """Runs the loop, and owns the tasks on it.

    ``start`` is called on the thread before the loop runs, ``stop`` after it. Making one waits for
    ``start``, however long an engine's weights take to load; what it returns is ``started``, what
    it raises is raised here.
    """

    def __init__(
        self, start: Callable[[asyncio.AbstractEventLoop], _T], stop: Callable[[], None]
    ) -> None:
        self._start = start
        self._stop = stop
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._value: Future[_T] = Future()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()
        # The worker tells that it is loading, and whoever started it may end it.
        self.started = self._value.result()

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        """Runs a function on the loop, soon."""
        self._loop.call_soon_threadsafe(function, *arguments)

    def own(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Starts a task, on the loop, and keeps it until it is done."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel_all(self, timeout_s: float) -> bool:
        """Ends all tasks; says whether that was done in time."""
        ending = asyncio.run_coroutine_threadsafe(self._cancel(), self._loop)
        try:
            ending.result(timeout_s)
        except FutureTimeoutError:
            ending.cancel()
            return False
        return True

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self, timeout_s: float) -> None:
        """Ends the tasks, then the loop, then calls ``stop``; each has the timeout to comply."""
        self.cancel_all(timeout_s)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            value = self._start(self._loop)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._loop.close()
            self._value.set_exception(error)
            return
        self._value.set_result(value)
        try:
            self._loop.run_forever()
        finally:
            self._stop()
            self._loop.run_until_complete(self._sweep())
            self._loop.close()

    async def _sweep(self) -> None:
        """Ends the tasks that the engine has left behind, as far as they comply."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=SWEEP_S)
