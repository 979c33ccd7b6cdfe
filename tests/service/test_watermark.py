"""Marked answers over a real router and worker: asked for over REST and gRPC, found in the tokens.

REST is served by the router itself, and by a gateway before it.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from shards.engines.base import EngineInfo, Outcome, Plan, Watermark
from shards.engines.scripted import ScriptedEngine
from shards.watermark import detect, is_green
from tests.service.fake_service import events_of
from tests.service.fakes import until
from tests.service.test_rest_router import GATEWAY, ROUTER, House, house_in

# The scripted engine prefers one token at each place by 4: this is stronger.
MARK = Watermark(gamma=0.25, delta=12.0, key=77)
SETTINGS = {"watermark_gamma": 0.25, "watermark_delta": 12.0, "watermark_key": 77}
PROMPT = "The railway came to the valley"
TOKENS = 24


@pytest.fixture(params=[ROUTER, GATEWAY])
async def house(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    through = str(request.param)
    async with house_in(tmp_path, through=through, **SETTINGS) as house:
        yield house


async def written(house: House, **parameters: object) -> list[int]:
    """The tokens of an answer, behind the last one of the prompt."""
    body = {"max_new_tokens": TOKENS, "decoder_input_details": True, **parameters}
    answer = await house.post("/generate", {"inputs": PROMPT, "parameters": body})
    assert answer.status_code == 200, answer.text
    details = answer.json()["details"]
    tokens: list[int] = [token["id"] for token in details["tokens"]]
    assert len(tokens) == TOKENS
    return [details["prefill"][-1]["id"], *tokens]


def is_marked(tokens: list[int]) -> bool:
    return all(is_green(before, token, MARK) for before, token in pairwise(tokens))


@pytest.mark.parametrize("drawing", [{}, {"temperature": 0.9, "seed": 1}])
async def test_the_mark_is_found_where_it_was_asked_for(
    house: House, drawing: dict[str, Any]
) -> None:
    marked, plain = await asyncio.gather(
        written(house, watermark=True, **drawing), written(house, **drawing)
    )
    assert is_marked(marked)
    assert detect(marked, MARK).z > 5
    assert detect(plain, MARK).z < 3
    assert detect(marked, replace(MARK, key=78)).z < 3
    body = {"max_new_tokens": TOKENS, "watermark": True, **drawing}
    answer = await house.post("/generate_stream", {"inputs": PROMPT, "parameters": body})
    assert [event["token"]["id"] for event in events_of(answer.text)] == marked[1:]


async def test_grpc_clients_can_have_it(house: House) -> None:
    marked = await written(house, watermark=True)
    params = pb.Parameters(max_tokens=TOKENS, temperature=0, watermark=True)
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        call = InferenceStub(channel).Generate(pb.GenerateRequest(text=PROMPT, parameters=params))
        tokens = [token async for message in call for token in message.token_ids]
    assert tokens == marked[1:]


async def test_it_goes_on_when_the_worker_is_lost(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = await written(house, watermark=True, temperature=0.9, seed=1)
    await until(house.idle)
    engine, gate = house.bench.engines["w"], house.bench.gates["w"]
    last, step = engine.begun + 9, engine.step

    def limited(plan: Plan) -> Outcome:
        if engine.begun + 1 == last:
            gate.clear()
        return step(plan)

    monkeypatch.setattr(engine, "step", limited)
    body = {"max_new_tokens": TOKENS, "watermark": True, "temperature": 0.9, "seed": 1}
    asked = asyncio.create_task(
        house.post("/generate_stream", {"inputs": PROMPT, "parameters": body})
    )
    await until(lambda: engine.begun == last)
    await house.bench.kill("w")
    await house.bench.start("w")
    events = events_of((await asked).text)
    assert [event["token"]["id"] for event in events] == unbroken[1:]
    assert house.snapshot.resumed == 1


async def test_an_engine_that_cannot_is_named_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(engine: ScriptedEngine) -> EngineInfo:
        features = tuple(one for one in engine._info.features if one not in ("watermark", "ranks"))
        return replace(engine._info, engine="sglang", features=features)

    monkeypatch.setattr(ScriptedEngine, "describe", describe)
    async with house_in(tmp_path) as house:
        for path in ("/generate", "/generate_stream"):
            body = {"inputs": PROMPT, "parameters": {"watermark": True}}
            answer = await house.post(path, body)
            assert answer.status_code == 422
            assert answer.json()["error_type"] == "validation"
            message = answer.json()["error"]
            assert "engine sglang, which does not support watermark: leave it out" in message
        async with grpc.aio.insecure_channel(house.grpc) as channel:
            for params in (pb.Parameters(watermark=True), pb.Parameters(ranks=True)):
                request = pb.GenerateRequest(text=PROMPT, parameters=params)
                with pytest.raises(grpc.aio.AioRpcError, match="sglang, which does not") as caught:
                    await InferenceStub(channel).Generate(request).read()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
