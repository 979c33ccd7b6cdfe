"""Work that is done for a client as long as it is there."""

import asyncio

import pytest
from starlette.types import Message

from router.api.rest.presence import ClientLeft, while_present

DEADLINE_S = 10.0


class Client:
    """What a server hears of a client: nothing, until it leaves."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


class Work:
    """Work that ends when it is told to, or is cancelled."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.told = asyncio.Event()
        self.cancelled = False
        self.task: asyncio.Task[object] | None = None

    async def run(self) -> str:
        self.task = asyncio.current_task()
        self.begun.set()
        try:
            await self.told.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "done"


async def test_work_has_a_task_of_its_own_and_its_result_comes_back() -> None:
    work = Work()
    work.told.set()
    async with asyncio.timeout(DEADLINE_S):
        assert await while_present(Client().receive, work.run()) == "done"
    assert work.task is not asyncio.current_task()


async def test_a_failure_is_the_works_own() -> None:
    async def fail() -> None:
        raise KeyError("why")

    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(KeyError, match="why"):
            await while_present(Client().receive, fail())


async def test_a_client_that_leaves_ends_the_work() -> None:
    client, work = Client(), Work()
    client.leaves.set()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ClientLeft):
            await while_present(client.receive, work.run())
    assert work.cancelled


async def test_a_caller_that_is_cancelled_ends_the_work() -> None:
    work = Work()
    caller = asyncio.create_task(while_present(Client().receive, work.run()))
    async with asyncio.timeout(DEADLINE_S):
        await work.begun.wait()
        caller.cancel()
        await asyncio.wait([caller])
    assert caller.cancelled()
    assert work.cancelled
