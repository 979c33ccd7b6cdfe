"""A gateway before a router whose groups come, go and change: it says what the router says.

Over real workers with the scripted engine, in this process.
"""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.config import GroupSpec
from router.faces import _free_port
from router.gateway import Gateway
from router.gateway_wire import fleet_to_wire
from router.remote_link import RouterLink
from router.text.tokenizer import Tokenizer
from router.v1 import gateway_pb2 as pb
from tests.engines.skilled import vector_of
from tests.service.fakes import PATIENCE_S, until
from tests.service.gateways import gateway_before
from tests.service.test_gateway import before, router_at
from tests.service.test_rest_router import GATEWAY, ROUTER, House, house_in

SKILLED: dict[str, Any] = {"adapters": ("verse",)}
YES = {"type": "regex", "value": "(yes|no){3}"}


class Slow:
    """A gateway that may be slow to act on what it hears: as if it had to fetch each tokenizer.

    It then misses all news but the first, which it is busy with, and the last. ``asked`` counts the
    tokenizers that it has wanted.
    """

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self._house = house
        self._leaves = asyncio.Semaphore(0)
        self._held = False
        self._heard = pb.Fleet()
        self.asked = 0
        real, read = Gateway._tokenizer, RouterLink.read

        async def hear(link: RouterLink) -> pb.ToGateway:
            message = await read(link)
            if message.HasField("fleet"):
                self._heard = message.fleet
            return message

        async def fetch(gateway: Gateway, link: RouterLink, sha256: str) -> Tokenizer:
            self.asked += 1
            if self._held:
                await self._leaves.acquire()
            return await real(gateway, link, sha256)

        monkeypatch.setattr(Gateway, "_tokenizer", fetch)
        monkeypatch.setattr(RouterLink, "read", hear)

    def hold(self) -> None:
        """It stands still at the next tokenizer that it wants."""
        self._held, self.asked = True, 0

    async def until_heard(self) -> None:
        """Waits until it has been told of the fleet as it is now."""
        groups = self._house.router.fleet.groups
        await until(lambda: self._heard == fleet_to_wire(groups()))

    def let(self) -> None:
        """It gets the tokenizer that it waits for, and stands still at the next one."""
        self._leaves.release()

    async def go_on(self) -> None:
        """It has been told everything, and gets all that it wants."""
        await self.until_heard()
        self._held = False
        self._leaves.release()


async def add(house: House, name: str, model: str | None = None, **worker: Any) -> GroupSpec:
    """A group with one worker comes and serves."""
    spec = GroupSpec(name, None, (await house.bench.start(name, model=model or "m", **worker),))
    house.router.groups.add(spec)
    await house.router.groups.wait_up(name)
    return spec


async def remove(house: House, name: str) -> None:
    await house.router.groups.remove(name, PATIENCE_S)


def same(gateway: Gateway, house: House) -> bool:
    """Whether both know the same of all models, groups and their order."""
    ours, theirs = gateway.fleet, house.router.fleet
    return (
        [model.groups for model in ours.models()] == [model.groups for model in theirs.models()]
        and list(ours.groups_up().items()) == list(theirs.groups_up().items())
        and [model.max_total_tokens for model in ours.models()]
        == [model.max_total_tokens for model in theirs.models()]
    )


def said(answer: httpx.Response) -> tuple[int, Any]:
    """What a client sees of an answer, but for what differs from one to the next."""
    body = answer.json()
    for name in ("id", "created"):
        body.pop(name, None)
    return answer.status_code, body


async def alike(
    house: House, client: httpx.AsyncClient, body: dict[str, Any], path: str = "/v1/completions"
) -> tuple[int, Any]:
    """The answer of the gateway, which is the router's own."""
    ours, theirs = await client.post(path, json=body), await house.post(path, body)
    assert said(ours) == said(theirs)
    return said(ours)


def asked(model: str, tokens: int = 4) -> dict[str, Any]:
    return {"model": model, "prompt": "Once upon", "max_tokens": tokens, "temperature": 0}


async def test_what_is_asked_beside_the_stream_goes_to_the_group_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway hears that a group has gone, and never that it was down before."""
    async with house_in(tmp_path, SKILLED) as house, before(house) as (gateway, client):
        slow = Slow(house, monkeypatch)
        slow.hold()
        await add(house, "new", **SKILLED)
        await remove(house, "g")
        await slow.go_on()
        await until(lambda: gateway.fleet.groups_up() == {"new": True})
        found = await client.post("/v1/embeddings", json={"input": [[1, 2, 3]]})
        assert found.json()["data"][0]["embedding"] == pytest.approx(vector_of([1, 2, 3]), abs=1e-6)
        parameters = {"max_new_tokens": 20, "grammar": YES}
        body = {"inputs": "well?", "parameters": parameters}
        status, answer = await alike(house, client, body, "/generate")
        assert (status, answer["generated_text"][:2] in ("ye", "no")) == (200, True)


async def test_a_model_goes_with_its_last_group_and_comes_back(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        for step_ms in ("0", "1"):
            await add(house, "second", "n", step_ms=step_ms)
            await until(lambda: same(gateway, house))
            status, answer = await alike(house, client, asked("n"))
            assert (status, answer["model"]) == (200, "n")
            await remove(house, "second")
            await house.bench.kill("second")
            await until(lambda: same(gateway, house))
            assert (await alike(house, client, asked("n")))[0] == 404
            assert (await alike(house, client, asked("m")))[0] == 200
            models = (await client.get("/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["m"]


async def test_the_default_model_is_the_routers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first group has gone and come back before the gateway could hear of it."""
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        slow = Slow(house, monkeypatch)
        (first,) = (spec for spec, _ in house.router.fleet.groups())
        await add(house, "second", "n")
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("tgi")))[1]["model"] == "m"
        slow.hold()
        await remove(house, "g")
        house.router.groups.add(first)
        await house.router.groups.wait_up("g")
        await slow.go_on()
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("tgi")))[1]["model"] == "n"
        await remove(house, "second")
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("tgi")))[1]["model"] == "m"


async def test_a_group_of_the_same_name_is_what_it_is_now(tmp_path: Path) -> None:
    """With other limits and features: what fits, and what can be asked for, is the new one's."""
    async with house_in(tmp_path, SKILLED) as house, before(house) as (gateway, client):
        assert (await alike(house, client, asked("verse", 500)))[0] == 200
        await add(house, "other")
        await remove(house, "g")
        await house.bench.kill("w")
        await add(house, "g", limits={"kv_tokens": 96})
        await remove(house, "other")
        await until(lambda: same(gateway, house))
        assert list(gateway.fleet.groups_up()) == ["g"]
        status, refusal = await alike(house, client, asked("m", 500))
        assert (status, "96" in refusal["error"]["message"]) == (400, True)
        assert (await alike(house, client, asked("verse")))[0] == 404
        assert (await alike(house, client, {"input": "x"}, "/v1/embeddings"))[0] == 400
        assert (await alike(house, client, asked("m", 50)))[0] == 200


async def test_a_group_that_has_not_come_up_is_not_taken_for_its_former_self(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        slow = Slow(house, monkeypatch)
        spec = await add(house, "second", "n")
        await until(lambda: same(gateway, house))
        slow.hold()
        await remove(house, "second")
        await house.bench.kill("second")
        house.router.groups.add(spec)
        await slow.go_on()
        await until(lambda: same(gateway, house))
        assert gateway.fleet.groups_up() == {"g": True, "second": False}
        assert (await alike(house, client, asked("n")))[0] == 404
        await house.bench.start("second", model="n")
        await house.router.groups.wait_up("second")
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("n")))[0] == 200


async def test_a_model_is_known_while_the_gateway_learns_of_its_new_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        slow = Slow(house, monkeypatch)
        expected = await house.text_of("x", 5)
        slow.hold()
        await add(house, "new")
        await remove(house, "g")
        await slow.until_heard()
        assert slow.asked == 1
        slow.let()
        await until(lambda: slow.asked == 2)
        body = {"inputs": "x", "parameters": {"max_new_tokens": 5}}
        answer = await client.post("/generate", json=body)
        assert (answer.status_code, answer.json()) == (200, {"generated_text": expected})
        await slow.go_on()
        await until(lambda: gateway.fleet.groups_up() == {"new": True})


async def test_a_model_that_is_still_to_come_is_known_by_name(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        late = GroupSpec("late", "big", (house.bench.address("late"),))
        house.router.groups.add(late)
        await until(lambda: same(gateway, house))
        status, answer = await alike(house, client, asked("big"))
        assert (status, "no worker of model 'big'" in answer["error"]["message"]) == (503, True)
        await remove(house, "late")
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("big")))[0] == 404


async def test_a_gateway_attaches_in_the_middle_of_a_switch(tmp_path: Path) -> None:
    """The only group leaves, its last stream still runs, and the next one is not up yet."""
    async with house_in(tmp_path, SKILLED | {"step_ms": "1"}) as house:
        expected = await house.text_of("x", 5)
        stream = asyncio.create_task(house.text_of("y", 2000))
        await until(lambda: house.router.groups.states()[0].running)
        house.bench.gates["w"].clear()
        leaving = asyncio.create_task(remove(house, "g"))
        await until(lambda: house.router.groups.states()[0].state == "leaving")
        async with before(house) as (gateway, client):
            assert same(gateway, house)
            status, answer = await alike(house, client, {"input": "x"}, "/v1/embeddings")
            assert (status, answer["error"]["code"]) == (503, "unavailable")
            body = {"inputs": "x", "parameters": {"max_new_tokens": 5}}
            waiting = asyncio.create_task(client.post("/generate", json=body))
            constrained = {"inputs": "x", "parameters": {"max_new_tokens": 5, "grammar": YES}}
            both = asyncio.create_task(client.post("/generate", json=constrained))
            await until(lambda: house.router.groups.waiting == 2)
            await add(house, "new", **SKILLED)
            assert (await waiting).json() == {"generated_text": expected}
            assert (await both).status_code == 200
            house.bench.gates["w"].set()
            await leaving
            assert await stream == await house.text_of("y", 2000)
            await until(lambda: same(gateway, house))
            assert (await client.post("/v1/embeddings", json={"input": "x"})).status_code == 200


@pytest.mark.parametrize("through", [ROUTER, GATEWAY])
async def test_embeddings_under_way_go_on_in_the_group_that_takes_the_place(
    tmp_path: Path, through: str
) -> None:
    """If the group that leaves has not made them within the limit."""
    async with house_in(tmp_path, SKILLED) as house, before(house) as (gateway, client):
        gate, engine = house.bench.gates["w"], house.bench.engines["w"]
        asker = client if through == GATEWAY else house.client
        gate.clear()
        body = {"input": [[1, 2, 3]]}
        call = asyncio.create_task(asker.post("/v1/embeddings", json=body))
        await until(lambda: engine.begun)
        await add(house, "new", **SKILLED)
        await until(lambda: same(gateway, house))
        await house.router.groups.remove("g", 0.05)
        found = (await call).json()
        gate.set()
        assert found["data"][0]["embedding"] == pytest.approx(vector_of([1, 2, 3]), abs=1e-6)
        assert house.bench.engines["new"].batches == [[[1, 2, 3]]]


async def test_of_a_router_that_is_started_again_it_knows_nothing_of_before(tmp_path: Path) -> None:
    """Its group has the same name and another model."""
    port = _free_port("127.0.0.1")
    async with gateway_before(f"127.0.0.1:{port}", wait=False) as (gateway, _):
        async with router_at(tmp_path, port):
            await until(gateway.ready.is_set)
            assert [model.id for model in gateway.fleet.models()] == ["m"]
        await until(lambda: not any(gateway.fleet.groups_up().values()))
        async with router_at(tmp_path, port, model="n"):
            await until(lambda: gateway.fleet.groups_up()["g"])
            assert [model.id for model in gateway.fleet.models()] == ["n"]


async def test_what_a_gateway_has_not_heard_yet_is_refused_by_the_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/gateway.md says: with the router's words, and as a model that cannot do it."""
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        slow = Slow(house, monkeypatch)
        await add(house, "second", "n")
        await until(lambda: same(gateway, house))
        slow.hold()
        await remove(house, "second")
        assert [model.id for model in gateway.fleet.models()] == ["m", "n"]
        answer = await client.post("/v1/completions", json=asked("n"))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "unsupported_parameter")
        assert error["message"] == "model 'n' is not served here; there is: m"
        await slow.go_on()
        await until(lambda: same(gateway, house))
        assert (await alike(house, client, asked("n")))[0] == 404
