"""Whatever becomes of requests, in the end nothing is held for them and each has been counted once.

Requests of every kind are sent at once, more than there is room for. Some are answered, some are
refused, some break off, and many of their clients leave, at any point.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.fakes import until
from tests.service.routes import TOOL
from tests.service.scraped import families_of
from tests.service.test_rest_router import GATEWAY, ROUTER, Body, House, house_in

USER = [{"role": "user", "content": "the way"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "boolean"}}}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SMALL = {"kv_tokens": 400, "sequences_max": 6, "step_tokens_max": 32}

BODIES: list[tuple[str, Body]] = [
    ("/generate", {"inputs": "the", "parameters": {"max_new_tokens": 12, "details": True}}),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 40, "stop": ["a", "é"]}}),
    ("/generate", {"inputs": "x", "parameters": {"best_of": 2, "max_new_tokens": 9, "top_k": 5}}),
    ("/generate", {"inputs": "x " * 90, "parameters": {"max_new_tokens": 60}}),
    ("/generate", {"inputs": "x " * 900}),
    ("/generate", {"inputs": "x", "parameters": {"top_p": 7.0}}),
    ("/generate", {"inputs": 7}),
    ("/generate_stream", {"inputs": "of", "parameters": {"max_new_tokens": 70}}),
    ("/", {"inputs": "of", "stream": True, "parameters": {"max_new_tokens": 5}}),
    (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 20}),
    (COMPLETIONS, {"prompt": "a", "n": 2, "best_of": 3, "max_tokens": 20, "logprobs": 2}),
    (COMPLETIONS, {"prompt": "the a of", "echo": True, "logprobs": 1, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 30, "stream": True, "n": 3}),
    (COMPLETIONS, {"prompt": [5, 99_999]}),
    (CHAT, {"messages": USER, "max_tokens": 30, "stream": True, "stop": ["the"]}),
    (CHAT, {"messages": USER, "max_tokens": 9, "response_format": SCHEMA}),
    (CHAT, {"messages": USER, "max_tokens": 25, "tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"messages": USER, "model": "none", "stream": True}),
    (CHAT, {"messages": USER, "n": 3, "max_tokens": 30, "presence_penalty": 1.0, "stream": True}),
    (RESPONSES, {"input": "the", "max_output_tokens": 20, "stream": True}),
    (RESPONSES, {"input": USER * 60, "max_output_tokens": 20, "truncation": "auto"}),
    ("/v1/messages", {"model": "tgi", "messages": USER, "max_tokens": 20, "stream": True}),
    ("/vertex", {"instances": [{"inputs": "a"}, {"messages": USER, "max_tokens": 5}]}),
]
BROKEN = (CHAT, {"messages": USER, "max_tokens": 9, "guided_regex": "("})
"""Refused by the worker; while that is away, by its engine, as a fault of it."""


class Crowd:
    """Clients of one house. ``dice`` says what each asks for and for how long it stays."""

    def __init__(self, house: House, dice: random.Random, *more: tuple[str, Body]) -> None:
        self.house = house
        self.dice = dice
        self.bodies = [*BODIES, *more]
        self.answered = 0
        self.jobs: list[tuple[Callable[[], Awaitable[None]], int | None]] = []

    async def rest(self) -> None:
        """Asks for something, and reads the answer to its end."""
        path, body = self.dice.choice(self.bodies)
        with suppress(httpx.TransportError):  # a server that restarts may end a connection
            async with self.house.client.stream("POST", path, json=body) as answer:
                assert answer.status_code != 500, await answer.aread()
                async for _ in answer.aiter_bytes():
                    pass
                self.answered += answer.status_code == 200

    async def grpc(self) -> None:
        """The same over gRPC, sometimes with a deadline that cannot be met."""
        limit = self.dice.choice((None, None, 0.05))
        several = pb.GenerateRequest(text="the", parameters={"max_tokens": 50})
        async with grpc.aio.insecure_channel(self.house.grpc) as channel:
            with suppress(grpc.aio.AioRpcError):
                async for _ in InferenceStub(channel).Generate(several, timeout=limit):
                    pass

    async def cut_off(self) -> None:
        """Sends the head of a request and not all of its body."""
        host, _, port = self.house.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
        await writer.drain()
        writer.close()

    async def stay(self, work: Awaitable[None], turns: int | None) -> None:
        """Does the work, for so many turns of the loop at most."""
        task = asyncio.ensure_future(work)
        for _ in range(turns or 0):
            if not task.done():
                await asyncio.sleep(0)
        if turns is not None:
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def come(self, count: int) -> None:
        """So many clients, all at once."""
        kinds: list[Callable[[], Awaitable[None]]] = [self.rest] * 8 + [self.grpc, self.cut_off]
        for _ in range(count):
            leaves = self.dice.random() < 0.4
            self.jobs.append(
                (self.dice.choice(kinds), self.dice.randrange(400) if leaves else None)
            )
        await asyncio.gather(*(self.stay(kind(), turns) for kind, turns in self.jobs))


def samples(text: str) -> dict[str, float]:
    return {
        ":".join((sample.name, *sample.labels.values())): sample.value
        for family in families_of(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


async def nothing_is_left(house: House) -> None:
    """All gauges are back, and what the engine holds is what the router knows of."""
    driver = house.router.driver
    await until(lambda: house.idle() and driver.open_requests == 0)
    await until(lambda: not any(group.plans_in_flight for group in house.snapshot.groups))
    own = samples(house.router.metrics.render().decode())
    for name in ("tgi_queue_size", "tgi_batch_current_size", "tgi_batch_current_max_tokens",
                 "roundhouse_requests_waiting", "roundhouse_requests_running"):  # fmt: skip
        assert own[name] == 0, name
    assert not driver._channels
    core: Any = driver._core
    (group,) = core._groups.values()
    engine: Any = house.bench.engines["w"]
    assert set(engine._residents.by_sequence) == set(group.donors)


async def counts_add_up(house: House) -> None:
    seen = samples((await house.client.get("/metrics")).text)
    failed = sum(value for name, value in seen.items() if name.startswith("tgi_request_failure:"))
    assert seen["tgi_request_count"] == seen["tgi_request_success"] + failed
    known = seen["tgi_request_duration_count"]
    for name in ("queue_duration", "generated_tokens", "input_length", "max_new_tokens"):
        assert seen[f"tgi_request_{name}_count"] == known
    assert seen["tgi_request_success"] <= known <= seen["tgi_request_count"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("through", [ROUTER, GATEWAY])
async def test_a_crowd(tmp_path: Path, through: str, seed: int) -> None:
    worker = {"limits": SMALL, "step_ms": "1"}
    async with house_in(tmp_path, worker, through=through, max_concurrent_requests=24) as house:
        crowd = Crowd(house, random.Random(seed), BROKEN)
        await crowd.come(80)
        await nothing_is_left(house)
        await counts_add_up(house)
        assert crowd.answered
        assert await house.text_of("next", 3)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("through", [ROUTER, GATEWAY])
async def test_a_crowd_whose_worker_is_lost(tmp_path: Path, through: str, seed: int) -> None:
    """Their answers go on when it is back, up to the last time that one may be lost."""
    worker = {"limits": SMALL, "step_ms": "2"}
    async with house_in(tmp_path, worker, through=through, max_concurrent_requests=24) as house:
        crowd = Crowd(house, random.Random(seed))
        coming = asyncio.create_task(crowd.come(60))
        for _ in range(3):
            await until(lambda: house.snapshot.running > 2 or coming.done())
            await house.bench.kill("w")
            await house.bench.start("w", **worker)
        await coming
        await until(lambda: house.snapshot.groups)
        await nothing_is_left(house)
        await counts_add_up(house)
        assert await house.text_of("next", 3)
