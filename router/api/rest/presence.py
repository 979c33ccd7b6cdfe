"""Noticing that a client has left while its answer is being made."""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType

from starlette.types import Receive

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a stream sends a comment, as axum and so TGI do."""


class ClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


class Presence:
    """Cancels the block it surrounds when the client disconnects, and raises ClientLeft from it.

    One task per request watches ``receive``; the request's body must have been read. With
    ``idle``, that coroutine function is called every KEEP_ALIVE_S seconds.
    """

    def __init__(self, receive: Receive, idle: Callable[[], Awaitable[None]] | None = None) -> None:
        self._receive = receive
        self._idle = idle
        self._left = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "runs within a task"
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watcher.cancel()
        await asyncio.wait([self._watcher])  # does not raise what the watcher ended with
        if self._left:
            self._task.uncancel()
            raise ClientLeft from None

    async def _watch(self) -> None:
        while not self._left:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S if self._idle else None):
                    message = await self._receive()
            except TimeoutError:
                if self._idle is not None:
                    await self._idle()
            else:
                self._left = message["type"] == "http.disconnect"
        self._task.cancel()
