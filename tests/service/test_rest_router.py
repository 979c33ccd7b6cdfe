"""Both faces over the real router and a real worker with the scripted engine, in this process.

REST is served by the router itself, and by a gateway before it: every test holds for both.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import openai
import pytest

from router.app import Router
from router.config import GroupSpec, Settings
from router.core.snapshot import Snapshot
from router.faces import Faces
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.fake_service import events_of
from tests.service.fakes import PATIENCE_S, Bench, bench_in, until
from tests.service.gateways import gateway_before

Body = dict[str, Any]
ROUTER, GATEWAY = "router", "gateway"


class House:
    """A router with its faces and one worker, ``w``. REST is asked at ``port``."""

    def __init__(self, router: Router, faces: Faces, bench: Bench, port: int) -> None:
        self.router = router
        self.bench = bench
        self.url = f"http://127.0.0.1:{port}"
        self.grpc = f"127.0.0.1:{faces.grpc_port}"
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE_S, limits=limits)

    @property
    def snapshot(self) -> Snapshot:
        return self.router.driver._core.snapshot()

    def idle(self) -> bool:
        """Nothing runs, waits or holds tokens, but for donors of prefixes."""
        seen = self.snapshot
        return (seen.running, seen.waiting, seen.groups[0].kv_used) == (0, 0, 0)

    async def post(self, path: str, body: Body) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def text_of(self, prompt: str, tokens: int) -> str:
        """The answer, which is the same however it is asked for."""
        answer = await self.post(
            "/generate", {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}
        )
        return str(answer.json()["generated_text"])


@asynccontextmanager
async def house_in(
    folder: Path, worker: dict[str, Any] | None = None, *, through: str = ROUTER, **settings: Any
) -> AsyncIterator[House]:
    async with (
        asyncio.timeout(3 * PATIENCE_S),
        bench_in(folder) as bench,
        AsyncExitStack() as stack,
    ):
        address = await bench.start("w", **(worker or {}))
        chosen = Settings(host="127.0.0.1", port=0, grpc_port=0, **settings)
        async with Router(chosen, [GroupSpec("g", None, (address,))]) as router:
            faces = await Faces.start(
                router.service,
                router.fleet,
                router.metrics,
                chosen,
                router.gateways,
                tracing=router.tracing,
            )
            rest = router.own(faces.run(), "rest")
            await router.fleet.wait_ready()
            port = faces.port
            if through == GATEWAY:
                gateway = gateway_before(f"127.0.0.1:{faces.grpc_port}")
                _, port = await stack.enter_async_context(gateway)
            house = House(router, faces, bench, port)
            try:
                yield house
            finally:
                await house.client.aclose()
                await faces.close()
                await rest


@pytest.fixture(params=[ROUTER, GATEWAY])
def through(request: pytest.FixtureRequest) -> str:
    """Which process serves REST."""
    return str(request.param)


@pytest.fixture
async def house(tmp_path: Path, through: str) -> AsyncIterator[House]:
    async with house_in(tmp_path, through=through) as house:
        yield house


async def ask_tgi(house: House, prompt: str, tokens: int) -> str:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "details": True}}
    answer = await house.post("/generate_stream", body)
    events = events_of(answer.text)
    details = events[-1]["details"]
    assert details["generated_tokens"] == len(events) == tokens
    assert [event["index"] for event in events] == list(range(1, tokens + 1))
    assert all(event["token"]["logprob"] < 0 for event in events)
    text = "".join(event["token"]["text"] for event in events)
    assert events[-1]["generated_text"].startswith(text)
    return str(events[-1]["generated_text"])


async def ask_completions(house: House, prompt: str, tokens: int) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    *events, usage, done = events_of((await house.post("/v1/completions", body)).text)
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == tokens
    return "".join(event["choices"][0]["text"] for event in events)


async def ask_grpc(house: House, prompt: str, tokens: int) -> str:
    parameters = pb.Parameters(max_tokens=tokens, temperature=0, stream_tokens=tokens % 4)
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        call = InferenceStub(channel).Generate(
            pb.GenerateRequest(text=prompt, parameters=parameters)
        )
        messages = [message async for message in call]
    assert sum(len(message.token_ids) for message in messages) == tokens
    assert messages[-1].finish.generated_tokens == tokens
    return "".join(message.text for message in messages)


async def until_failure(call: Any) -> AsyncIterator[pb.GenerateResponse]:
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for message in call:
            yield message


async def test_64_mixed_streams_lose_and_mix_nothing(house: House) -> None:
    ways = (ask_tgi, ask_completions, ask_grpc, House.text_of)
    cases = [(ways[i % 4], f"prompt {i // 4} says 🚂", 5 + i % 4 + i // 4) for i in range(64)]
    answers = await asyncio.gather(*(way(house, prompt, tokens) for way, prompt, tokens in cases))
    for (_, prompt, tokens), answer in zip(cases, answers, strict=True):
        assert answer == await house.text_of(prompt, tokens)
    await until(house.idle)


BAD: list[tuple[str, Body, int]] = [
    ("/generate", {"inputs": ""}, 422),
    ("/generate", {"inputs": "a " * 20_000}, 422),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 10_000}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"top_p": 1.5}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"top_p": -1}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"typical_p": 2.0}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"frequency_penalty": 3}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"temperature": 1e30}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"truncate": 1_000_000}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"top_k": 2**40}}, 422),
    ("/generate", {"inputs": "x", "parameters": {"stop": [""]}}, 422),
    ("/generate", {"inputs": "x" * 3_000_000}, 413),
    ("/v1/completions", {"prompt": [10**9]}, 400),
    ("/v1/completions", {"prompt": [2**63]}, 400),
    ("/v1/completions", {"prompt": "x", "temperature": -1}, 400),
    ("/v1/completions", {"prompt": "x", "presence_penalty": 2.5}, 400),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"0": 101}}, 400),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"4000000000": 1}}, 400),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [-1]}, 400),
    ("/v1/completions", {"prompt": "x", "min_tokens": 9, "max_tokens": 3}, 400),
    ("/v1/completions", {"prompt": "x", "model": "no/such"}, 404),
    ("/v1/completions", {"prompt": [10**9], "echo": True}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 20_000}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user"}], "min_p": 1.5}, 400),
    ("/chat_tokenize", {"messages": []}, 422),
    ("/tokenize", {"inputs": ""}, 422),
]


async def test_bad_input_has_its_error_and_changes_nothing(house: House) -> None:
    running = asyncio.create_task(house.text_of("meanwhile", 200))
    for path, body, status in BAD:
        answer = await house.post(path, body)
        assert answer.status_code == status, (path, str(body)[:80], answer.text)
        assert answer.json()["error"]
        if path.startswith("/v1/"):
            streamed = await house.post(path, {**body, "stream": True})
            assert streamed.status_code == status
        elif path == "/generate":
            assert (await house.post("/generate_stream", body)).status_code == status
    assert await running == await house.text_of("meanwhile", 200)
    await until(house.idle)


async def test_texts_of_all_scripts_round_trip(house: House) -> None:
    text = "🙂👩‍👩‍👧 e\u0301 שלום مرحبا 日本 \u0000 \u200d \U0010ffff"
    answer = await house.post("/v1/completions", {"prompt": text, "echo": True, "max_tokens": 1})
    assert answer.json()["choices"][0]["text"].startswith(text)
    tokens = (await house.post("/tokenize", {"inputs": text})).json()
    raw = text.encode()
    assert (
        b"".join(
            raw[start:stop]
            for start, stop in sorted({(token["start"], token["stop"]) for token in tokens})
        )
        == raw
    )


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_frees_its_tokens(
    tmp_path: Path, through: str, path: str, begun: bool
) -> None:
    async with house_in(tmp_path, {"step_ms": "2"}, through=through) as house:
        gate = house.bench.gates["w"]
        if not begun:
            gate.clear()
        openais = {"prompt": "x y z", "n": 2, "temperature": 0}
        body = openais if "v1" in path else {"inputs": "x", "parameters": {}}
        call = asyncio.create_task(house.post(path, body))
        steps = 5 if begun else 1
        await until(lambda: house.snapshot.running and house.bench.engines["w"].begun >= steps)
        assert not house.idle()
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: house.router.driver.open_requests == 0)
        plans = house.snapshot.groups[0].plans
        gate.set()
        await until(house.idle)
        assert house.snapshot.groups[0].plans - plans <= 4
        assert await house.text_of("next", 3)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
async def test_a_client_that_leaves_while_it_waits_for_its_turn_is_forgotten(
    tmp_path: Path, through: str, path: str
) -> None:
    async with house_in(tmp_path, {"step_ms": "2"}, through=through, max_batch_size=1) as house:
        first = asyncio.create_task(house.text_of("first", 200))
        await until(lambda: house.snapshot.running == 1)
        body = {"prompt": "x"} if "v1" in path else {"inputs": "x"}
        waiting = [asyncio.create_task(house.post(path, body)) for _ in range(3)]
        await until(lambda: house.snapshot.waiting == 3)
        waiting[1].cancel()
        await until(lambda: house.snapshot.waiting == 2)
        for call in waiting:
            call.cancel()
        await asyncio.wait(waiting)
        await until(lambda: house.router.driver.open_requests == 1)
        assert (house.snapshot.running, house.snapshot.waiting) == (1, 0)
        assert await first == await house.text_of("first", 200)


async def test_a_grpc_client_that_leaves_or_is_late_frees_its_tokens(tmp_path: Path) -> None:
    async with (
        house_in(tmp_path, {"step_ms": "2"}) as house,
        grpc.aio.insecure_channel(house.grpc) as channel,
    ):
        stub = InferenceStub(channel)
        request = pb.GenerateRequest(text="x", parameters={"temperature": 0})
        call = stub.Generate(request)
        assert (await call.read()).token_ids
        call.cancel()
        await until(house.idle)
        late = stub.Generate(request, timeout=0.2)
        received = [message async for message in until_failure(late)]
        assert received
        assert await late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(house.idle)


async def test_a_slow_reader_stalls_nobody(house: House) -> None:
    expected = await house.text_of("fast", 50)
    host, port = house.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)
    fields = {"prompt": "slow", "stream": True, "logprobs": 5, "max_tokens": 5000}
    body = json.dumps({**fields, "temperature": 0})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    await until(lambda: house.snapshot.running == 1)
    for _ in range(3):
        assert await house.text_of("fast", 50) == expected
    # Its answer is computed to the end, whether or not it is read: its batch does not wait.
    await until(house.idle)
    writer.close()


async def test_too_many_requests_are_told_to_come_back(tmp_path: Path, through: str) -> None:
    few = {"max_concurrent_requests": 8}
    async with house_in(tmp_path, {"step_ms": "1"}, through=through, **few) as house:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 300}}
        answers = await asyncio.gather(*(house.post("/generate", body) for _ in range(80)))
        by_status = {
            status: [a for a in answers if a.status_code == status] for status in (200, 429)
        }
        assert len(by_status[200]) + len(by_status[429]) == 80
        assert len(by_status[200]) >= 8
        assert by_status[429]
        for answer in by_status[429]:
            assert answer.json()["error_type"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
        await until(house.idle)


async def test_a_lost_worker_ends_a_stream_with_an_event(tmp_path: Path, through: str) -> None:
    worker = {"step_ms": "2", "lost_after_steps": "10"}
    async with house_in(tmp_path, worker, through=through, attempts_max=1) as house:
        chat = {"messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}
        events = events_of((await house.post("/v1/chat/completions", chat)).text)
        assert events[-2]["error"]["code"] == "worker_lost"
        assert events[-1] == "[DONE]"


async def test_the_openai_client_over_the_whole_house(house: House) -> None:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="-") as client:
        answer = await client.chat.completions.create(
            model="tgi",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=12,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [3] * 12
        stream = await client.chat.completions.create(
            model="tgi",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
        texts = [c.delta.content or "" async for chunk in stream for c in chunk.choices]
        assert "".join(texts) == choice.message.content


async def test_metrics_and_info_are_the_routers(house: House) -> None:
    await house.text_of("x", 3)
    metrics = (await house.client.get("/metrics")).text
    assert "tgi_request_count" in metrics
    info = (await house.client.get("/info")).json()
    assert info["model_id"] == "m"
    assert info["max_total_tokens"] == 8192
