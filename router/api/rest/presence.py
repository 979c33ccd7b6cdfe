"""Noticing that a client has left while its answer is being made."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a stream sends a comment, as axum and so TGI do."""


class ClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


async def while_present(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    idle: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Returns what ``work`` does; cancels it when the client disconnects, and raises ClientLeft.

    The work is a task of its own: within the request's, each token would climb through all layers
    of the application. Another task watches ``receive``; the request's body must have been read.
    With ``idle``, that coroutine function is called every KEEP_ALIVE_S seconds.
    """
    job = asyncio.create_task(work)
    left = asyncio.Event()
    watcher = asyncio.create_task(_watch(receive, idle, left, job))
    try:
        return await job
    except BaseException:
        if left.is_set():
            raise ClientLeft from None
        raise
    finally:
        watcher.cancel()
        await asyncio.wait([watcher])  # does not raise what the watcher ended with


async def _watch(
    receive: Receive,
    idle: Callable[[], Awaitable[None]] | None,
    left: asyncio.Event,
    job: asyncio.Task[Any],
) -> None:
    while not left.is_set():
        try:
            async with asyncio.timeout(KEEP_ALIVE_S if idle else None):
                message = await receive()
        except TimeoutError:
            if idle is not None:
                await idle()
        else:
            if message["type"] == "http.disconnect":
                left.set()
    job.cancel()
