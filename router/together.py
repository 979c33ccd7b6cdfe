"""Calls to several workers at once, as one: the first failure ends them all."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import TypeVar

from router.link import LinkDownError, one_line

T = TypeVar("T")


async def all_of(calls: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Runs calls at once and returns what they return, in their order. Raises as ``together``."""
    return await together([asyncio.create_task(call) for call in calls])


async def together(work: Sequence[asyncio.Future[T]]) -> list[T]:
    """Owns the work until all of it is done; the first failure cancels the rest and is raised.

    Several ``LinkDownError`` become one, of the kind that they have in common. Not
    ``asyncio.TaskGroup``: where a task fails just as the group is cancelled, that reports the
    failure and forgets the cancellation (Python 3.11, 3.12), and the router would not end.
    """
    try:
        await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for one in work:
            one.cancel()
        await asyncio.wait(work)
    failures = [one.exception() for one in work if not one.cancelled()]
    causes = [failure for failure in failures if failure is not None]
    for cause in causes:
        if not isinstance(cause, LinkDownError):
            raise cause
    if causes:
        kinds = {type(cause) for cause in causes}
        kind = kinds.pop() if len(kinds) == 1 else LinkDownError
        raise kind(one_line(causes))
    return [one.result() for one in work]
