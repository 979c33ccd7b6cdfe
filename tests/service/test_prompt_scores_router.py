"""Log probabilities of prompts over a real router and worker, also when that is lost on the way."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shards.engines.base import Outcome, Plan
from tests.service.fakes import until
from tests.service.test_rest_router import GATEWAY, ROUTER, House, house_in

PROMPT = "The railway came to the valley in the spring. " * 3
CHUNK = 16


@pytest.fixture(params=[ROUTER, GATEWAY])
async def house(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    through = str(request.param)
    async with house_in(tmp_path, through=through, max_batch_prefill_tokens=CHUNK) as house:
        yield house


async def prefill(house: House, **more: object) -> list[dict[str, Any]]:
    parameters = {"max_new_tokens": 3, "decoder_input_details": True, **more}
    answer = await house.post("/generate", {"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    details = answer.json()["details"]
    assert details["generated_tokens"] == 3
    found: list[dict[str, Any]] = details["prefill"]
    return found


async def test_a_prompt_in_chunks_is_told_whole_whoever_else_has_it(house: House) -> None:
    first = await prefill(house)
    assert len(first) > 2 * CHUNK
    assert "".join(token["text"] for token in first) == PROMPT
    assert [token["logprob"] is None for token in first] == [True] + [False] * (len(first) - 1)
    assert all(token["logprob"] < 0 for token in first[1:])
    # It is resident by now, and is computed anew for whoever wants to know.
    again = await asyncio.gather(*(prefill(house) for _ in range(3)))
    assert again == [first] * 3
    assert house.snapshot.prefix_hit_tokens == 0
    await house.text_of(PROMPT, 3)
    assert house.snapshot.prefix_hit_tokens > 2 * CHUNK, "others share what was computed for it"
    await until(house.idle)


async def test_a_worker_lost_within_the_prompt_leaves_no_trace(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = await prefill(house)
    await until(house.idle)
    engine, gate = house.bench.engines["w"], house.bench.gates["w"]
    last, step = engine.begun + 3, engine.step

    def limited(plan: Plan) -> Outcome:
        if engine.begun + 1 == last:
            gate.clear()
        return step(plan)

    monkeypatch.setattr(engine, "step", limited)
    asked = asyncio.create_task(prefill(house))
    await until(lambda: engine.begun == last)
    # Two chunks were computed, and the third will not be: now the worker is gone.
    await house.bench.kill("w")
    await house.bench.start("w")
    assert await asked == unbroken
    assert house.snapshot.resumed == 1
