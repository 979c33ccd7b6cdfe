"""A server that ends its groups for one that is coming is healthy: what is asked is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.changing import Changes
from tests.service.fakes import until
from tests.service.kserve_rig import PB, Client
from tests.service.test_changing_router import LIMIT_S, BenchWorkers
from tests.service.test_gateway import before
from tests.service.test_rest_router import House, house, house_in, through

__all__ = ["house", "through"]

GENERATE = {"inputs": "Once", "parameters": {"max_new_tokens": 4}}


class Switch:
    """A switch to a group that is started once the former one has ended, and loads till told."""

    def __init__(self, house: House) -> None:
        self.workers = BenchWorkers(house.bench)
        self.workers.running.clear()
        self.workers.gate.clear()
        self.lines: list[str] = []
        own, groups = house.router.own, house.router.groups
        self.changes = Changes(groups, self.workers, own, LIMIT_S)
        self.task = asyncio.create_task(self.changes.switch("new", True, 0, self._tell))

    def _tell(self, line: str, loaded: float) -> None:
        self.lines.append(line)

    async def end(self) -> None:
        """The new group has loaded, and serves."""
        self.workers.gate.set()
        await self.task


@asynccontextmanager
async def switching(house: House) -> AsyncIterator[Switch]:
    """A switch that has ended the former group, and waits for the new one."""
    switch = Switch(house)
    try:
        await until(lambda: "new: loading" in switch.lines)
        assert not any(house.router.fleet.groups_up().values())
        yield switch
    finally:
        await switch.changes.close()
        await asyncio.gather(switch.task, return_exceptions=True)


async def statuses(client: httpx.AsyncClient) -> set[int]:
    return {(await client.get(path)).status_code for path in ("/health", "/ping", "/")}


async def until_status(client: httpx.AsyncClient, status: int) -> None:
    while await statuses(client) != {status}:
        await asyncio.sleep(0.01)


async def test_rest_is_healthy_while_a_group_is_coming(house: House) -> None:
    async with switching(house) as switch:
        assert await statuses(house.client) == {200}
        asked = asyncio.create_task(house.post("/generate", GENERATE))
        await until(lambda: switch.changes.waiting == 1)
        await switch.end()
        assert (await asked).status_code == 200
        assert await statuses(house.client) == {200}
        await house.bench.kill("new")
        await until_status(house.client, 503)


async def test_it_is_not_for_longer_than_streams_wait(tmp_path: Path) -> None:
    async with (
        house_in(tmp_path, resume_timeout_s=0.2) as house,
        before(house) as (_, client),
        switching(house) as switch,
    ):
        await until_status(house.client, 503)
        await until_status(client, 503)
        await switch.end()
        await until_status(house.client, 200)
        await until_status(client, 200)


async def test_grpc_is_healthy_while_a_group_is_coming(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, grpc.aio.insecure_channel(house.grpc) as channel:
        health, kserve = health_pb2_grpc.HealthStub(channel), Client(channel)
        request = health_pb2.HealthCheckRequest()
        model = PB["Named"](name="m")

        async def seen() -> list[bool]:
            states = health_pb2.HealthCheckResponse
            index = await kserve.ask("RepositoryIndex", "RepositoryIndexResponse")
            return [
                (await health.Check(request)).status == states.SERVING,
                (await kserve.ask("ServerReady", "ServerReadyResponse")).ready,
                (await kserve.ask("ModelReady", "ModelReadyResponse", model)).ready,
                index.models[0].state == "READY",
            ]

        async with switching(house):
            assert await seen() == [True] * 4
        assert await seen() == [False] * 4, "the switch was given up, and no group is left"


async def test_a_gateway_that_attaches_meanwhile_serves(tmp_path: Path) -> None:
    async with (
        house_in(tmp_path) as house,
        switching(house) as switch,
        before(house) as (gateway, client),
    ):
        assert gateway.fleet.groups_up() == {"g": False}
        assert await statuses(client) == {200}
        asked = asyncio.create_task(client.post("/generate", json=GENERATE))
        await until(lambda: switch.changes.waiting == 1)
        await switch.end()
        assert (await asked).status_code == 200


async def test_a_gateway_whose_router_goes_expects_nobody(tmp_path: Path) -> None:
    async with (
        house_in(tmp_path) as house,
        before(house) as (_, client),
        switching(house),
    ):
        assert await statuses(client) == {200}
        house.router.gateways.close()
        await until_status(client, 503)


async def test_a_model_that_nobody_knows_is_not_waited_for(tmp_path: Path) -> None:
    """As before its first group: a request would be refused."""
    async with house_in(tmp_path) as house:
        await house.router.groups.remove("g", LIMIT_S)
        with house.router.groups.expecting():
            assert await statuses(house.client) == {503}
            assert (await house.post("/generate", GENERATE)).status_code == 503
