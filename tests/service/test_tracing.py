"""Traces of a real router and gateway before the scripted engine, as a real collector gets them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.config import GroupSpec
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.collector import CALLER, TRACE, Collector
from tests.service.fakes import until
from tests.service.gateways import gateway_before
from tests.service.test_rest_router import House, house_in
from tests.service.ways import WAYS, Wish

PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "mine=7"}
ASK = {"inputs": "hello", "parameters": {"max_new_tokens": 6, "temperature": 0.5, "seed": 7}}
ENDLESS = {"inputs": "x", "parameters": {"max_new_tokens": 5000}}
SLOW = {"step_ms": "2"}


@asynccontextmanager
async def traced(folder: Path, collector: Collector, **more: Any) -> AsyncIterator[House]:
    async with house_in(folder, otlp_endpoint=collector.endpoint, **more) as house:
        yield house


async def stream(house: House, body: Any, path: str = "/generate_stream") -> AsyncIterator[str]:
    """The lines of a stream that say something."""
    async with house.client.stream("POST", path, json=body) as answer:
        async for line in answer.aiter_lines():
            if line:
                yield line


def contained(collector: Collector) -> None:
    """Each span lies within its parent, but for the millisecond that the driver's clock has."""
    spans = {span.id: span for span in collector.spans}
    for span in spans.values():
        if (parent := spans.get(span.parent)) is not None:
            assert parent.start_ns - 1e6 <= span.start_ns <= span.end_ns <= parent.end_ns + 1e6


async def test_a_call_is_a_span_with_its_answer_below_it(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector) as house:
        headers = PARENT | {"x-request-id": "mine-7"}
        answer = await house.client.post("/generate", json=ASK, headers=headers)
        assert answer.status_code == 200
    call = collector.one("POST /generate")
    assert (call.kind, call.service, call.failed) == ("server", "roundhouse", False)
    assert (call.trace, call.parent, call.state) == (TRACE, CALLER, "mine=7")
    assert call.attributes == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "roundhouse.request_id": "mine-7",
    }
    (below,) = collector.below(call)
    assert (below.name, below.kind, below.events) == ("text_completion m", "internal", [])
    queue_s = below.attributes.pop("gen_ai.latency.time_in_queue")
    first_s = below.attributes.pop("gen_ai.response.time_to_first_chunk")
    assert 0 <= queue_s <= first_s <= (below.end_ns - below.start_ns) / 1e9
    assert below.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "roundhouse",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ["length"],
        "roundhouse.group": "g",
        "roundhouse.sequence": 1,
    }


async def test_what_took_the_time_of_an_answer_is_below_it(
    tmp_path: Path, collector: Collector
) -> None:
    grammar = {"type": "regex", "value": "(yes|no){3}"}
    body = {"inputs": "well " * 1000, "parameters": {"max_new_tokens": 9, "grammar": grammar}}
    async with traced(tmp_path, collector, worker=SLOW, max_batch_size=1) as house:
        waiting = asyncio.ensure_future(house.post("/generate", {**ENDLESS, "stream": True}))
        await until(lambda: house.snapshot.running == 1)
        later = asyncio.ensure_future(house.post("/generate", body))
        await until(lambda: house.snapshot.waiting == 1)
        waiting.cancel()
        assert (await later).status_code == 200
    answer = next(
        span
        for span in collector.named("text_completion m")
        if span.attributes["gen_ai.response.finish_reasons"] != ["cancelled"]
    )
    phases = collector.below(answer)
    assert [phase.name for phase in phases] == ["tokenize", "compile", "queue", "prefill", "decode"]
    assert all(one.end_ns <= two.start_ns for one, two in pairwise(phases))
    tokenize, compile_, queue, prefill, decode = phases
    assert min(tokenize.end_ns - tokenize.start_ns, compile_.end_ns - compile_.start_ns) > 0
    assert queue.end_ns - queue.start_ns == pytest.approx(
        answer.attributes["gen_ai.latency.time_in_queue"] * 1e9, abs=1
    )
    assert queue.end_ns - queue.start_ns > 0
    assert prefill.attributes == decode.attributes == {"roundhouse.group": "g"}
    contained(collector)


async def test_a_stream_is_one_call_and_a_chat_is_called_so(
    tmp_path: Path, collector: Collector
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "n": 2}
    async with traced(tmp_path, collector) as house:
        lines = [
            one async for one in stream(house, body | {"stream": True}, "/v1/chat/completions")
        ]
        assert len(lines) > 2
    call = collector.one("POST /v1/chat/completions")
    answers = collector.below(call)
    assert [one.name for one in answers] == ["chat m", "chat m"]
    assert {one.attributes["roundhouse.sequence"] for one in answers} == {1, 2}
    assert call.attributes["http.response.status_code"] == 200
    contained(collector)


async def test_a_call_of_grpc_is_a_span_below_the_one_in_its_metadata(
    tmp_path: Path, collector: Collector
) -> None:
    ask = pb.GenerateRequest(text="hello", parameters=pb.Parameters(max_tokens=4))
    async with traced(tmp_path, collector) as house, grpc.aio.insecure_channel(house.grpc) as to:
        metadata = (*PARENT.items(), ("x-request-id", "theirs"))
        async for _ in InferenceStub(to).Generate(ask, metadata=metadata):
            pass
    call = collector.one("router.v1.Inference/Generate")
    assert (call.kind, call.trace, call.parent, call.failed) == ("server", TRACE, CALLER, False)
    assert call.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "router.v1.Inference/Generate",
        "rpc.response.status_code": "OK",
        "roundhouse.request_id": "theirs",
    }
    (answer,) = collector.below(call)
    assert answer.attributes["gen_ai.usage.output_tokens"] == 4


async def test_what_is_refused_is_no_error_of_the_server_and_says_its_kind(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector) as house, grpc.aio.insecure_channel(house.grpc) as to:
        await house.post("/v1/completions", {"prompt": "a", "model": "xyzzy"})
        await house.post("/generate", {"inputs": ""})
        await house.post("/xyzzy?xyzzy=1", {})
        await house.client.post("/generate", content=b"{xyzzy")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in InferenceStub(to).Generate(pb.GenerateRequest(text="a", model="xyzzy")):
                pass
    seen = {
        span.name: (
            span.attributes.get("http.response.status_code"),
            span.attributes.get("rpc.response.status_code"),
            span.attributes.get("error.type"),
        )
        for span in collector.spans
        if "400" not in str(span.attributes)
    }
    assert seen == {
        "POST /v1/completions": (404, None, "MODEL_NOT_FOUND"),
        "POST /generate": (422, None, "VALIDATION"),
        "POST": (404, None, None),
        "router.v1.Inference/Generate": (None, "NOT_FOUND", "MODEL_NOT_FOUND"),
    }
    assert len(collector.spans) == 5
    assert not any(span.failed for span in collector.spans)
    assert not any(b"xyzzy" in message for message in collector.sent)


async def test_a_full_server_is_seen_in_the_call_that_it_refuses(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector, max_concurrent_requests=1) as house:
        house.bench.gates["w"].clear()
        first = asyncio.ensure_future(house.post("/generate", ASK))
        await until(lambda: house.router.driver.open_requests)
        assert (await house.post("/generate", ASK)).status_code == 429
        house.bench.gates["w"].set()
        await first
    calls = collector.named("POST /generate")
    by_status = {call.attributes["http.response.status_code"]: call for call in calls}
    refused, answered = by_status[429], by_status[200]
    assert (refused.attributes["error.type"], refused.failed) == ("OVERLOADED", False)
    assert collector.below(refused) == []
    assert len(collector.below(answered)) == 1


@pytest.mark.parametrize("face", ["rest", "grpc"])
async def test_a_client_that_leaves_is_seen_and_is_no_error(
    tmp_path: Path, collector: Collector, face: str
) -> None:
    async with traced(tmp_path, collector, worker=SLOW) as house:
        if face == "rest":
            async for _ in stream(house, ENDLESS):
                break
        else:
            async with grpc.aio.insecure_channel(house.grpc) as to:
                ask = pb.GenerateRequest(text="x", parameters=pb.Parameters(max_tokens=5000))
                async for _ in InferenceStub(to).Generate(ask):
                    break
        await until(house.idle)
        await until(lambda: house.router.driver.open_requests == 0)
    answer = collector.one("text_completion m")
    call = collector.one(
        "POST /generate_stream" if face == "rest" else "router.v1.Inference/Generate"
    )
    assert answer.attributes["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert answer.attributes["error.type"] == call.attributes["error.type"] == "CANCELLED"
    assert not answer.failed
    assert not call.failed
    if face == "grpc":
        assert call.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_an_answer_that_survives_its_worker_tells_of_both_lives(
    tmp_path: Path, collector: Collector
) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 200}}
    async with traced(tmp_path, collector, worker=SLOW) as house:
        seen = 0
        async for _ in stream(house, body):
            seen += 1
            if seen == 10:
                await house.bench.kill("w")
                await house.bench.start("w")
        assert seen >= 200
    answer = collector.one("text_completion m")
    assert not answer.failed
    assert answer.event("group.down") == {"roundhouse.group": "g"}
    again = answer.event("resumed")
    assert (again["roundhouse.cause"], again["roundhouse.group"]) == ("lost", "g")
    assert again["roundhouse.tokens"] >= 10
    assert again["roundhouse.silent_ms"] >= 0
    down, resumed = answer.events
    assert answer.start_ns < down.at_ns <= resumed.at_ns < answer.end_ns


async def test_a_worker_that_is_lost_for_good_is_an_error_of_the_server(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector, worker=SLOW, resume_streams=False) as house:
        async for _ in stream(house, ENDLESS):
            if "w" in house.bench._running:
                await house.bench.kill("w")
    answer, call = collector.one("text_completion m"), collector.one("POST /generate_stream")
    assert call.attributes["http.response.status_code"] == 200, "it had begun"
    for span in (answer, call):
        assert (span.failed, span.attributes["error.type"]) == (True, "WORKER_LOST")
    assert answer.event("group.down") == {"roundhouse.group": "g"}


async def test_an_answer_that_moves_says_from_where_and_where_to(
    tmp_path: Path, collector: Collector
) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 300}}
    async with traced(tmp_path, collector, worker=SLOW) as house:
        async for _ in stream(house, body):
            if "other" not in house.bench._running:
                where = await house.bench.start("other", **SLOW)
                house.router.groups.add(GroupSpec("other", None, (where,)))
                await house.router.groups.wait_up("other")
                await house.router.groups.remove("g", 20.0)
    again = collector.one("text_completion m").event("resumed")
    assert (again["roundhouse.cause"], again["roundhouse.group_before"]) == ("moved", "g")
    assert again["roundhouse.group"] == "other"
    assert collector.one("decode").attributes == {"roundhouse.group": "other"}
    assert collector.one("prefill").attributes == {"roundhouse.group": "g"}


async def test_an_answer_that_was_put_back_for_want_of_memory_says_so(
    tmp_path: Path, collector: Collector
) -> None:
    small: dict[str, Any] = {"limits": {"kv_tokens": 700}}
    body = {"inputs": "x", "parameters": {"max_new_tokens": 500}}
    async with traced(tmp_path, collector, worker=small) as house:
        await asyncio.gather(*(house.post("/generate", body) for _ in range(2)))
        assert house.snapshot.preempted > 0
    answers = collector.named("text_completion m")
    events = [event for answer in answers for event in answer.events]
    assert {event.name for event in events} == {"resumed"}
    assert {event.attributes["roundhouse.cause"] for event in events} == {"preempted"}


async def test_through_a_gateway_it_is_one_trace(tmp_path: Path, collector: Collector) -> None:
    async with (
        traced(tmp_path, collector) as house,
        gateway_before(house.grpc, otlp_endpoint=collector.endpoint) as (_, port),
    ):
        url = f"http://127.0.0.1:{port}/generate"
        assert (await house.client.post(url, json=ASK, headers=PARENT)).status_code == 200
    call = collector.one("POST /generate")
    assert (call.service, call.trace, call.parent) == ("roundhouse-gateway", TRACE, CALLER)
    (asked,) = collector.below(call)
    assert (asked.service, asked.kind) == ("roundhouse-gateway", "client")
    assert asked.attributes["gen_ai.usage.output_tokens"] == 6
    tokenize, answer = collector.below(asked)
    assert (tokenize.name, tokenize.service) == ("tokenize", "roundhouse-gateway")
    assert (answer.name, answer.service, answer.kind) == (
        "text_completion m",
        "roundhouse",
        "server",
    )
    assert answer.attributes["gen_ai.usage.output_tokens"] == 6
    assert [one.name for one in collector.below(answer)] == ["queue", "prefill", "decode"]
    assert {(span.trace, span.state) for span in collector.spans} == {(TRACE, "mine=7")}


async def test_a_router_traces_what_comes_from_a_gateway_that_does_not(
    tmp_path: Path, collector: Collector
) -> None:
    async with traced(tmp_path, collector) as house, gateway_before(house.grpc) as (_, port):
        await house.client.post(f"http://127.0.0.1:{port}/generate", json=ASK, headers=PARENT)
    assert collector.names() == ["decode", "prefill", "queue", "text_completion m"]
    assert collector.one("text_completion m").parent == ""


async def test_vectors_are_counted_at_their_call(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector, worker={"adapters": ("verse",)}) as house:
        answer = await house.post("/v1/embeddings", {"input": ["xyzzy", "more"]})
        tokens = answer.json()["usage"]["prompt_tokens"]
    call = collector.one("POST /v1/embeddings")
    assert call.attributes["gen_ai.operation.name"] == "embeddings"
    assert call.attributes["gen_ai.request.model"] == "m"
    assert call.attributes["gen_ai.usage.input_tokens"] == tokens > 0


async def test_probes_are_not_traced(tmp_path: Path, collector: Collector) -> None:
    async with traced(tmp_path, collector) as house:
        for path in ("/health", "/metrics", "/info", "/v1/models"):
            assert (await house.client.get(path)).status_code == 200
    assert collector.spans == []


async def test_a_seed_beyond_what_spans_can_hold_costs_no_span(
    tmp_path: Path, collector: Collector
) -> None:
    body = {"prompt": "a", "max_tokens": 2, "temperature": 1, "seed": 2**64 - 1}
    async with traced(tmp_path, collector) as house:
        assert (await house.post("/v1/completions", body)).status_code == 200
    assert "gen_ai.request.seed" not in collector.one("text_completion m").attributes


async def test_no_word_of_anybody_is_sent(tmp_path: Path, collector: Collector) -> None:
    """All ways to ask, over all faces, with what clients may write beside their prompts."""
    wish = Wish("xyzzy plugh", 12, 3)
    tools = [{"type": "function", "function": {"name": "xyzzy", "parameters": {"type": "object"}}}]
    async with traced(tmp_path, collector) as house:
        said = [(await way(house, wish)).text for way in WAYS]
        body = {"messages": wish.messages, "max_tokens": 4, "user": "xyzzy", "stop": ["xyzzy"]}
        chat = {**body, "tools": tools, "metadata": {"plugh": "xyzzy"}}
        answer = await house.post("/v1/chat/completions?xyzzy=plugh", chat)
        assert answer.status_code == 200
    words = {word for text in said for word in text.split() if len(word) > 5}
    assert words, "the engine says something"
    assert len(collector.spans) > 4 * len(WAYS)
    for message in collector.sent:
        for word in ("xyzzy", "plugh", "<|im_start|>", *words):
            assert word.encode() not in message
