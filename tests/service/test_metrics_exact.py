"""A scrape after known traffic, over REST and the real router: every number is exact."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.app import Router
from router.ask import Ask, Params
from router.config import GroupSpec, Settings
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service import fmaas_rig
from tests.service.fakes import PATIENCE_S, bench_in, until
from tests.service.kserve_rig import Client, parameters, raw_request
from tests.service.scraped import families_of
from tests.service.test_rest_router import House, house_in

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, max_concurrent_requests=3, max_best_of=3) as house:
        yield house


async def scrape(house: House) -> dict[str, float]:
    """Samples by name, with the value of their one label behind it."""
    await until(lambda: house.idle() and not house.snapshot.groups[0].plans_in_flight)
    text = (await house.client.get("/metrics")).text
    return {
        ":".join((sample.name, *sample.labels.values())): sample.value
        for family in families_of(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


async def ok(house: House, path: str, body: dict[str, object], status: int = 200) -> None:
    answer = await house.post(path, body)
    assert answer.status_code == status, answer.text


def given(tokens: int, **more: object) -> dict[str, object]:
    return {"inputs": "x y", "parameters": {"max_new_tokens": tokens, **more}}


async def test_each_answer_is_one_request_on_every_route(house: House) -> None:
    await ok(house, "/generate", given(2))
    await ok(house, "/generate_stream", given(3))
    await ok(house, "/", given(1))
    await ok(house, "/invocations", given(1))
    chat, greedy = "/v1/chat/completions", {"temperature": 0}  # by chance, an answer ends early
    await ok(house, chat, {"messages": USER, "max_tokens": 4, **greedy})
    await ok(house, chat, {"messages": USER, "max_tokens": 2, "stream": True, **greedy})
    await ok(house, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, **greedy})  # two
    await ok(house, "/generate", given(6, best_of=3, temperature=0.01))  # three
    seen = await scrape(house)
    assert seen["tgi_request_count"] == seen["tgi_request_success"] == 11
    assert seen["roundhouse_generated_tokens_total"] == 2 + 3 + 1 + 1 + 4 + 2 + 10 + 18
    assert all(value == 0 for name, value in seen.items() if name.startswith("tgi_request_failure"))
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration"):
        assert seen[f"tgi_request_{name}_count"] == 11
    for name in ("generated_tokens", "max_new_tokens"):
        assert (seen[f"tgi_request_{name}_count"], seen[f"tgi_request_{name}_sum"]) == (11, 41)
    assert seen["tgi_request_mean_time_per_token_duration_count"] == 11
    assert (seen["tgi_request_skipped_tokens_count"], seen["tgi_request_skipped_tokens_sum"]) == (
        41,
        0,
    )
    assert seen["roundhouse_time_to_first_token_seconds_count"] == 11
    assert seen["roundhouse_inter_token_latency_seconds_count"] == 41 - 11


async def test_each_refusal_is_one_failure_whoever_refuses(house: House) -> None:
    for path in ("/generate", "/generate_stream", "/", "/invocations"):
        await ok(house, path, given(2, top_n_tokens=99), 422)  # by the route
        await ok(house, path, given(2, top_p=7.0), 422)  # by the service
    await ok(house, "/v1/completions", {"prompt": "x", "model": "none"}, 404)
    for stream in (False, True):
        chat: dict[str, object] = {"messages": USER, "stream": stream}
        await ok(house, "/v1/chat/completions", chat | {"model": "none"}, 404)
        tools = [{"type": "function", "function": {"name": "no name"}}]
        await ok(house, "/v1/chat/completions", chat | {"tools": tools}, 400)
        await ok(house, "/v1/chat/completions", chat | {"top_p": 7.0}, 400)
    await ok(house, "/vertex", {"instances": [{"inputs": ""}]}, 422)
    # As in TGI, none of these is a request.
    await ok(house, "/generate", {"inputs": 7}, 422)
    await ok(house, "/tokenize", {"inputs": ""}, 422)
    seen = await scrape(house)
    assert seen["tgi_request_failure:validation"] == seen["tgi_request_count"] == 8 + 1 + 6 + 1
    assert seen["tgi_request_success"] == 0


async def test_over_grpc_each_refusal_is_one_failure_too(house: House) -> None:
    """Whoever refuses, and however many answers or prompts it is wrong with."""
    refused = 0

    async def refuses(call: Awaitable[object]) -> None:
        nonlocal refused
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        refused += 1

    async with grpc.aio.insecure_channel(house.grpc) as channel:
        ours, theirs, triton = InferenceStub(channel), fmaas_rig.Client(channel), Client(channel)
        faults: tuple[dict[str, Any], ...] = (
            {"n": 999}, {"top_p": 7}, {"n": 3, "top_p": 7}, {"constraint": {"choice": {}}},
        )  # fmt: skip
        for given in faults:
            message = {"role": "user", "content": "x"}
            for call in (
                ours.Generate(pb.GenerateRequest(text="x", parameters=given)),
                ours.Chat(pb.ChatRequest(messages=[message], parameters=given)),
            ):
                await refuses(call.read())
        await refuses(ours.Generate(pb.GenerateRequest(text="x", best_of=9)).read())
        for fault in (
            {"decoding": {"length_penalty": {"decay_factor": 2}}},
            {"method": 1, "sampling": {"temperature": -1}},
        ):
            await refuses(theirs.generate(fmaas_rig.batch("a", "b", "c", params=fault)))
            await refuses(theirs.generate_stream(fmaas_rig.single("a", params=fault)).read())
        for wrong in ({"bogus": 1}, {"top_p": 7}, {"max_tokens": 10**6}):
            given = raw_request("x", "y", parameters=parameters(**wrong))
            await refuses(triton.infer(given))
            (told,) = [one async for one in triton.stream(iter([given]))]
            assert told.error_message
            refused += 1
        # As on REST, a text that is only tokenised is no request.
        empty = fmaas_rig.PB["BatchedTokenizeRequest"]()
        with pytest.raises(grpc.aio.AioRpcError):
            await theirs.tokenize(empty)
    seen = await scrape(house)
    assert seen["tgi_request_failure:validation"] == seen["tgi_request_count"] == refused == 19


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_with_several_answers_is_one_failure(
    house: House, stream: bool
) -> None:
    several: dict[str, object] = {"n": 3, "stream": stream, "max_tokens": 2}
    for number, wrong in enumerate(
        (
            {"logit_bias": {"99999999": 1}},
            {"model": "none"},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        ),
        start=1,
    ):
        for path, asked in (
            ("chat/completions", {"messages": USER}),
            ("completions", {"prompt": "a"}),
        ):
            answer = await house.post(f"/v1/{path}", {**asked, **several, **wrong})
            assert answer.status_code in (400, 404), answer.text
        seen = await scrape(house)
        assert seen["tgi_request_failure:validation"] == seen["tgi_request_count"] == 2 * number


async def test_overload_and_clients_that_leave(house: House) -> None:
    house.bench.gates["w"].clear()
    running = [asyncio.create_task(house.post("/generate", given(4))) for _ in range(3)]
    await until(lambda: house.router.driver.open_requests == 3)
    await ok(house, "/generate", given(4), 429)
    running[0].cancel()
    await until(lambda: house.router.driver.open_requests == 2)
    house.bench.gates["w"].set()
    await asyncio.gather(*running[1:])
    seen = await scrape(house)
    assert seen["tgi_request_count"] == 4
    assert seen["tgi_request_success"] == 2
    assert seen["tgi_request_failure:overloaded"] == 1
    assert seen["tgi_request_failure:dropped"] == 1
    for name in ("duration", "queue_duration", "input_length", "generated_tokens"):
        assert seen[f"tgi_request_{name}_count"] == 3  # what was refused took no time


async def test_calls_of_the_model(house: House) -> None:
    """One after the other: each request is one prefill, and a decode for each token but one."""
    for tokens in (1, 4, 3):
        await ok(house, "/generate", given(tokens))
        await until(house.idle)
    seen = await scrape(house)
    assert seen["tgi_batch_inference_count:prefill"] == 3
    assert seen["tgi_batch_inference_success:prefill"] == 3
    assert seen["tgi_batch_next_size_sum"] == seen["tgi_batch_next_size_count"] == 3
    assert seen["tgi_batch_concat:chunking"] == 0
    decodes = seen["tgi_batch_inference_count:decode"]
    # A plan that was on its way when the answer ended is a call, too.
    assert 3 + 2 <= decodes <= 3 + 2 + 3
    assert seen["tgi_batch_inference_success:decode"] == decodes
    assert seen["tgi_batch_forward_duration_count:decode"] == decodes
    delivered = [
        seen[f"tgi_batch_filter_duration_count:{method}"] for method in ("prefill", "decode")
    ]
    assert sum(delivered) >= 1 + 4 + 3  # every token was handed out
    calls = ("prefill", "decode")
    engine_s = sum(seen[f"tgi_batch_forward_duration_sum:{method}"] for method in calls)
    assert 0 < engine_s <= sum(seen[f"tgi_batch_inference_duration_sum:{m}"] for m in calls)
    assert seen["roundhouse_step_seconds_count:g"] >= 3 + decodes
    assert seen["tgi_queue_size"] == seen["tgi_batch_current_size"] == 0


async def test_requests_that_join_running_ones(house: House) -> None:
    house.bench.gates["w"].clear()
    first = asyncio.create_task(house.post("/generate", given(30)))
    await until(lambda: house.bench.engines["w"].begun)
    others = [asyncio.create_task(house.post("/generate", given(30))) for _ in range(2)]
    await until(lambda: house.router.driver.open_requests == 3)
    house.bench.gates["w"].set()
    await asyncio.gather(first, *others)
    seen = await scrape(house)
    assert seen["tgi_batch_next_size_sum"] == 3
    assert seen["tgi_batch_concat:chunking"] >= 1


async def test_what_a_prefix_saves(house: House) -> None:
    prompt = {"inputs": "the same words again and again " * 10, "parameters": {"max_new_tokens": 2}}
    await ok(house, "/generate", prompt)
    before = await scrape(house)
    assert before["roundhouse_prefix_hit_tokens_total"] == 0
    length = before["tgi_request_input_length_sum"]
    assert before["roundhouse_admitted_tokens_total"] == length
    await ok(house, "/generate", prompt)
    seen = await scrape(house)
    assert 0 < seen["roundhouse_prefix_hit_tokens_total"] < length
    assert seen["tgi_request_input_length_sum"] == 2 * length
    assert seen["roundhouse_kv_tokens_used:g"] == 0
    assert seen["roundhouse_kv_tokens_cached:g"] >= length
    assert seen["roundhouse_preemptions_total"] == 0


async def test_an_answer_that_goes_on_in_another_group(tmp_path: Path) -> None:
    async with asyncio.timeout(PATIENCE_S), bench_in(tmp_path) as bench:
        addresses = {name: await bench.start(name, step_ms="5") for name in ("a", "b")}
        groups = [GroupSpec(name, None, (address,)) for name, address in addresses.items()]
        async with Router(Settings(), groups) as router:
            await until(lambda: all(router.fleet.groups_up().values()))
            ask = Ask("one two", Params(max_tokens=30, temperature=0.0))
            async with await router.service.generate(ask) as answer:
                await anext(answer)
                snapshot = router.driver._core.snapshot()
                (running,) = (group.name for group in snapshot.groups if group.running)
                other = next(name for name in addresses if name != running)
                await bench.kill(running)
                chunks = [chunk async for chunk in answer]
            assert chunks[-1].finish is not None
            assert chunks[-1].finish.generated_tokens == 30
            await until(lambda: not router.fleet.groups_up()[running])
            shown = router.metrics.render().decode()
    for name, up in ((running, 0), (other, 1)):
        assert f'roundhouse_group_up{{group="{name}"}} {up}.0' in shown
        assert f'roundhouse_group_losses_total{{group="{name}"}} {1 - up}.0' in shown
    name = 'roundhouse_continuations_total{from_engine="scripted",to_engine="scripted"}'
    assert f"{name} 1.0" in shown
    assert "roundhouse_resumptions_total 1.0" in shown
    assert "tgi_request_success 1.0" in shown
    assert "tgi_request_count 1.0" in shown
