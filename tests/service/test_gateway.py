"""Gateways before a real router and real workers with the scripted engine, in this process.

That each route answers as the router's own does is shown in ``test_rest_router``.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from router.app import Router
from router.ask import Ask, Constraint, ConstraintKind, Finish, Params, TokenOut
from router.config import ConfigError, GroupSpec, Settings
from router.errors import Fault, RequestError
from router.faces import Faces, _free_port
from router.gateway import Gateway
from router.gateway_wire import PROTOCOL, limits_to_wire
from router.service import Service
from router.v1 import gateway_pb2 as pb
from router.v1.gateway_pb2_grpc import GatewayStub
from tests.engines.skilled import vector_of
from tests.service.fake_service import events_of
from tests.service.fakes import PATIENCE_S, bench_in, until
from tests.service.gateways import gateway_before
from tests.service.test_rest_router import House, house_in

ENDLESS = {"inputs": "x", "parameters": {"max_new_tokens": 5000}}


@asynccontextmanager
async def client_of(port: int, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, **options) as client:
        yield client


@asynccontextmanager
async def before(house: House, **options: Any) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    async with gateway_before(house.grpc, **options) as (gateway, port), client_of(port) as client:
        yield gateway, client


def number(shown: str, name: str) -> float:
    """The value of a metric without labels."""
    (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


async def events(client: httpx.AsyncClient, body: Any, got: list[str]) -> list[Any]:
    """Streams, and notes each line as it comes."""
    async with client.stream("POST", "/generate_stream", json=body) as answer:
        async for line in answer.aiter_lines():
            got.append(line)  # noqa: PERF401 - the test watches it grow
    return events_of("\n".join(got))


async def answer(service: Service, ask: Ask) -> tuple[list[TokenOut], Finish]:
    tokens: list[TokenOut] = []
    async with await service.generate(ask) as generation:
        async for chunk in generation:
            tokens += chunk.tokens
            if chunk.finish is not None:
                # How much of a prompt was resident depends on who asked before.
                return tokens, replace(chunk.finish, cached_tokens=0)
    raise AssertionError("it has no end")


PARAMS = [
    Params(temperature=0, max_tokens=9),
    Params(seed=5, max_tokens=30, stop=("them",)),
    Params(seed=5, max_tokens=9, logprobs=True, top_logprobs=4, prompt_logprobs=True),
    Params(temperature=0, max_tokens=9, min_tokens=9, logit_bias=((300, 50.0),)),
    Params(temperature=0, max_tokens=40, stop_token_ids=(268,), include_stop=True),
    Params(seed=5, max_tokens=9, prompt_logprobs=True, ranks=True, watermark=True),
]


@pytest.mark.parametrize("params", PARAMS)
async def test_an_answer_is_the_same_on_both_sides(tmp_path: Path, params: Params) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, _):
        ask = Ask("the same question", params)
        assert await answer(gateway.service, ask) == await answer(house.router.service, ask)
        await until(house.idle)


async def test_before_an_older_router_there_are_no_watermarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its workers may have them, but nobody says with which key."""

    def as_before(settings: Settings) -> pb.Limits:
        limits = limits_to_wire(settings)
        for name in ("watermark_gamma", "watermark_delta", "watermark_key"):
            limits.ClearField(name)  # type: ignore[arg-type]
        return limits

    monkeypatch.setattr("router.api.gateway_server.limits_to_wire", as_before)
    async with house_in(tmp_path) as house, before(house) as (gateway, _):
        params = Params(seed=5, max_tokens=9)
        tokens, _finish = await answer(gateway.service, Ask("a question", params))
        assert len(tokens) == 9
        with pytest.raises(RequestError, match="watermark") as caught:
            await gateway.service.generate(Ask("a", replace(params, watermark=True)))
        assert caught.value.fault is Fault.UNSUPPORTED
    older = [record.getMessage() for record in caplog.records if "older" in record.getMessage()]
    assert older == [
        f"router {house.grpc} is older than this gateway, so there is no watermark here: "
        "update it first"
    ]


async def test_constraints_are_compiled_and_kept_through_a_gateway(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, _):
        pair = (gateway.service, house.router.service)
        wanted = Constraint(ConstraintKind.REGEX, "(yes|no){3}")
        ask = Ask("well?", Params(max_tokens=40, seed=3, constraint=wanted))
        ours, theirs = [await answer(service, ask) for service in pair]
        assert ours == theirs
        assert re.fullmatch(wanted.text, ours[1].text)
        broken = replace(ask, params=Params(constraint=Constraint(ConstraintKind.REGEX, "(")))
        faults = []
        for service in pair:
            with pytest.raises(RequestError) as caught:
                await service.generate(broken)
            faults.append((caught.value.fault, caught.value.field, caught.value.message))
        assert faults[0] == faults[1]
        assert faults[0][:2] == (Fault.VALIDATION, "grammar")


async def test_two_gateways_share_a_port_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (first, client):
        port = int(client.base_url.port or 0)
        async with before(house, port=port) as (second, _):
            expected = await house.text_of("shared", 4)
            # Each over a connection of its own, for it is connections that the system shares out.
            for _ in range(40):
                async with client_of(port) as one:
                    body = {"inputs": "shared", "parameters": {"max_new_tokens": 4}}
                    assert (await one.post("/generate", json=body)).json() == {
                        "generated_text": expected
                    }
            shown = [one.metrics.render().decode() for one in (first, second)]
            counts = [number(one, "tgi_request_count") for one in shown]
            assert min(counts) > 0
            assert sum(counts) == 40
            router = house.router.metrics.render().decode()
            assert number(router, "tgi_request_count") == 1
            assert number(router, "tgi_request_generated_tokens_sum") == 4
            assert number(router, "roundhouse_gateways") == 2
            assert number(router, "roundhouse_admitted_tokens_total") > 40 * 4
            assert all(number(one, "roundhouse_gateway_attached") == 1 for one in shown)
            assert not any("tgi_queue_size" in one or "tgi_batch" in one for one in shown)
        await until(lambda: "roundhouse_gateways 1.0" in house.router.metrics.render().decode())


async def test_a_gateway_that_ends_frees_its_tokens_and_answers_its_clients(tmp_path: Path) -> None:
    async with house_in(tmp_path, {"step_ms": "2"}) as house:
        async with before(house) as (gateway, client):
            got: list[str] = []
            calls = [asyncio.create_task(events(client, ENDLESS, got)) for _ in range(5)]
            await until(lambda: house.snapshot.running == 5 and got)
            gateway.driver.stop()
            await asyncio.wait(calls)
        assert sum("shutting down" in line for line in got) == 5
        await until(lambda: house.router.driver.open_requests == 0)
        await until(house.idle)


async def test_a_gateway_that_vanishes_frees_its_tokens_within_two_steps(tmp_path: Path) -> None:
    async with (
        house_in(tmp_path, {"step_ms": "2"}) as house,
        grpc.aio.insecure_channel(house.grpc) as channel,
    ):
        call = GatewayStub(channel).Attach()  # type: ignore[no-untyped-call]
        await call.write(pb.FromGateway(hello=pb.Hello(protocol=PROTOCOL)))
        wanted = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 5000}
        submits = [pb.Submit(request=number, **wanted) for number in range(4)]  # type: ignore[arg-type]
        await call.write(pb.FromGateway(submits=submits))
        while not (await call.read()).delivery.tokens:
            pass
        gate, engine = house.bench.gates["w"], house.bench.engines["w"]
        gate.clear()
        begun = engine.begun
        await until(lambda: engine.begun > begun)
        call.cancel()
        await until(lambda: house.router.driver.open_requests == 0)
        plans = house.snapshot.groups[0].plans
        gate.set()
        await until(house.idle)
        # Two may be on their way already; behind them comes the one that drops what it held.
        assert house.snapshot.groups[0].plans - plans <= 2


async def test_a_deadline_is_kept_by_the_router(tmp_path: Path) -> None:
    async with house_in(tmp_path, {"step_ms": "5"}) as house, before(house) as (gateway, _):
        with pytest.raises(RequestError) as caught:
            await answer(
                gateway.service, Ask("x", Params(max_tokens=5000, ignore_eos=True), deadline_s=0.2)
            )
        assert caught.value.fault is Fault.DEADLINE
        await until(house.idle)


async def test_embeddings_are_made_through_a_gateway(tmp_path: Path) -> None:
    async with house_in(tmp_path, {"adapters": ("verse",)}) as house, before(house) as (_, client):
        body: dict[str, Any] = {"input": [[1, 2, 3], [4]]}
        found = (await client.post("/v1/embeddings", json=body)).json()["data"]
        assert [one["embedding"] for one in found] == [
            pytest.approx(vector_of(ids), abs=1e-6) for ids in body["input"]
        ]
        answer = await client.post("/v1/embeddings", json={"input": "x", "model": "verse"})
        assert answer.status_code == 400
        gate, engine = house.bench.gates["w"], house.bench.engines["w"]
        gate.clear()
        begun = engine.begun
        call = asyncio.create_task(client.post("/v1/embeddings", json=body))
        await until(lambda: engine.begun > begun)
        await house.bench.kill("w")
        lost = await call
        assert lost.status_code in (424, 503)
        assert lost.json()["error"]["code"] in ("worker_lost", "unavailable")


async def test_a_gateway_follows_the_fleet(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/info")).json() == (await house.client.get("/info")).json()
        await house.bench.kill("w")
        await until(lambda: not any(gateway.fleet.groups_up().values()))
        assert (await client.get("/health")).status_code == 503
        await house.bench.start("w")
        await until(lambda: any(gateway.fleet.groups_up().values()))
        assert (await client.get("/health")).status_code == 200
        body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
        assert (await client.post("/generate", json=body)).status_code == 200


async def test_a_gateway_follows_groups_that_come_and_go(tmp_path: Path) -> None:
    """A stream of its client goes on while the group that it began in is removed."""
    async with house_in(tmp_path) as house, before(house) as (gateway, client):
        groups, (first,) = house.router.groups, house.router.groups.names()
        body = {"inputs": "x", "parameters": {"max_new_tokens": 400}}
        whole = (await client.post("/generate", json=body)).json()
        stream = asyncio.create_task(client.post("/generate", json=body))
        await until(lambda: groups.states()[0].running)
        groups.add(GroupSpec("new", None, (await house.bench.start("new"),)))
        await groups.wait_up("new")
        await groups.remove(first, PATIENCE_S)
        await until(lambda: gateway.fleet.groups_up() == {"new": True})
        assert (await stream).json() == whole
        assert (await client.post("/generate", json=body)).json() == whole


async def test_keys_of_clients_and_of_the_router(tmp_path: Path) -> None:
    async with house_in(tmp_path, api_key="inner") as house:
        with pytest.raises(ConfigError, match="--router-api-key"):
            async with gateway_before(house.grpc, router_key="wrong"):
                raise AssertionError("it is attached")
        async with before(house, router_key="inner", api_key="outer") as (_, client):
            body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
            for key, status in (("outer", 200), ("inner", 401), ("", 401)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                answer = await client.post("/generate", json=body, headers=headers)
                assert answer.status_code == status


async def test_before_the_router_is_there_a_gateway_says_so_and_waits(tmp_path: Path) -> None:
    grpc_port = _free_port("127.0.0.1")
    nowhere = gateway_before(f"127.0.0.1:{grpc_port}", wait=False)
    async with nowhere as (gateway, port), client_of(port) as client:
        assert (await client.get("/health")).status_code == 503
        answer = await client.post("/generate", json={"inputs": "x"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        async with router_at(tmp_path, grpc_port):
            await until(gateway.ready.is_set)
            assert (await client.get("/health")).status_code == 200


@asynccontextmanager
async def router_at(
    folder: Path, grpc_port: int, given: dict[str, Any] | None = None, **worker: str
) -> AsyncIterator[tuple[Router, Faces]]:
    """A router at a port of gRPC; leaving it is as abrupt as its end."""
    async with bench_in(folder) as bench:
        address = await bench.start("w", **worker)
        settings = Settings(host="127.0.0.1", port=0, grpc_port=grpc_port, **(given or {}))
        async with Router(settings, [GroupSpec("g", None, (address,))]) as router:
            faces = await Faces.start(
                router.service, router.fleet, router.metrics, settings, router.gateways
            )
            rest = router.own(faces.run(), "rest")
            await router.fleet.wait_ready()
            try:
                yield router, faces
            finally:
                await faces._rpc.stop(None)
                await faces.close()
                await rest


async def test_a_lost_router_ends_streams_and_is_found_again(tmp_path: Path) -> None:
    grpc_port = _free_port("127.0.0.1")
    got: list[str] = []
    nowhere = gateway_before(f"127.0.0.1:{grpc_port}", wait=False)
    async with nowhere as (gateway, port), client_of(port) as client:
        async with router_at(tmp_path, grpc_port, step_ms="2"):
            await until(gateway.ready.is_set)
            stream = asyncio.create_task(events(client, ENDLESS, got))
            whole = asyncio.create_task(client.post("/generate", json=ENDLESS))
            await until(lambda: len(got) > 3)
        *tokens, last = await stream
        assert [event["index"] for event in tokens] == list(range(1, len(tokens) + 1))
        assert last["error_type"] == "generation"
        assert "connection to the router was lost" in last["error"]
        assert (await whole).status_code == 424
        assert (await client.get("/health")).status_code == 503
        refused = await client.post("/generate", json=ENDLESS)
        assert (refused.status_code, refused.json()["error_type"]) == (503, "unavailable")
        async with router_at(tmp_path, grpc_port, {"max_total_tokens": 50}):
            await until(lambda: any(gateway.fleet.groups_up().values()))
            body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
            assert (await client.post("/generate", json=body)).status_code == 200
            # The limits are those of the router that is there now.
            longer = await client.post("/generate", json=ENDLESS)
            assert longer.status_code == 422
            assert "must be <= 50" in longer.json()["error"]


async def test_a_router_that_shuts_down_lets_a_gateways_answers_end(tmp_path: Path) -> None:
    grpc_port = _free_port("127.0.0.1")
    nowhere = gateway_before(f"127.0.0.1:{grpc_port}", wait=False)
    async with (
        nowhere as (gateway, port),
        client_of(port) as client,
        router_at(tmp_path, grpc_port, step_ms="2") as (router, faces),
    ):
        await until(gateway.ready.is_set)
        got: list[str] = []
        body = {"inputs": "x", "parameters": {"max_new_tokens": 100}}
        stream = asyncio.create_task(events(client, body, got))
        await until(lambda: got)
        faces.stop_intake()
        draining = asyncio.create_task(router.driver.drain(PATIENCE_S))
        await until(lambda: not any(gateway.fleet.groups_up().values()))
        assert (await client.get("/health")).status_code == 503
        refused = await client.post("/generate", json=body)
        assert refused.status_code == 503
        *_, last = await stream
        assert last["generated_text"]
        await draining
        await until(lambda: not router.gateways._attached)


async def test_64_streams_over_one_gateway_mix_nothing(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house, before(house) as (_, client):
        bodies = [
            {"inputs": f"prompt {i % 16} says", "parameters": {"max_new_tokens": 5 + i}}
            for i in range(64)
        ]
        answers = await asyncio.gather(*(events(client, body, []) for body in bodies))
        for body, found in zip(bodies, answers, strict=True):
            tokens = body["parameters"]["max_new_tokens"]  # type: ignore[index]
            assert Counter(len(event) for event in found).total() == tokens
            text = await house.text_of(str(body["inputs"]), tokens)
            assert found[-1]["generated_text"] == text
