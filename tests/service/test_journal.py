"""What the log says of requests: who, how long and how it ended; never what was asked or said."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.test_rest_router import GATEWAY, ROUTER, House, house_in

SECRET = "xyzzy"
ASK = {"inputs": f"{SECRET} and more", "parameters": {"max_new_tokens": 5}}


@pytest.fixture(params=[ROUTER, GATEWAY])
async def house(
    tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[House]:
    async with house_in(tmp_path, through=request.param) as house:
        caplog.set_level(logging.INFO, "router")
        yield house


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    """Level, message and fields of what was said of requests."""
    return [
        (record.levelname, record.getMessage(), record.__dict__["fields"])
        for record in caplog.records
        if record.name == "router.journal"
    ]


async def test_an_answer_is_one_line_with_the_name_that_its_client_knows(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await house.client.post("/generate", json=ASK, headers={"x-request-id": "mine-7"})
    ((level, message, fields),) = lines(caplog)
    assert (level, message) == ("INFO", "request ended")
    assert (fields["request"], fields["reason"], fields["tokens"]) == ("mine-7", "length", 5)
    assert fields["prompt_tokens"] > 1
    assert 0 <= fields["first_token_ms"] <= fields["total_ms"]
    assert SECRET not in caplog.text
    assert answer.json()["generated_text"] not in caplog.text


async def test_a_name_that_was_made_up_is_the_one_of_the_answer(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": [SECRET, "water"], "max_tokens": 3}
    answer = await house.post("/v1/completions", body)
    names = {fields["request"] for _, _, fields in lines(caplog)}
    assert len(lines(caplog)) == 2
    assert names == {answer.headers["x-request-id"]}


async def test_a_refusal_is_one_line_without_the_words_of_the_client(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await house.post("/v1/completions", {"prompt": "a", "model": SECRET})
    assert SECRET in answer.text
    assert lines(caplog) == [
        (
            "INFO",
            "request refused",
            {
                "request": answer.headers["x-request-id"],
                "reason": "MODEL_NOT_FOUND",
                "field": "model",
            },
        )
    ]
    assert SECRET not in caplog.text


async def test_a_lost_worker_is_a_warning_for_each_stream_that_it_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house_in(tmp_path, resume_streams=False) as house:
        body = {"inputs": SECRET, "parameters": {"max_new_tokens": 5000}}
        async with house.client.stream("POST", "/generate_stream", json=body) as answer:
            events = answer.aiter_lines()
            await anext(events)  # one that has no token yet would wait for another worker
            await house.bench.kill("w")
            async for _ in events:
                pass
    ((level, _, fields),) = lines(caplog)
    assert (level, fields["request"]) == ("WARNING", answer.headers["x-request-id"])
    assert (fields["reason"], fields["group"]) == ("worker_lost", "g")
    assert "worker was lost" in fields["detail"]


async def test_a_call_of_grpc_is_named_by_its_metadata(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "router")
    async with house_in(tmp_path) as house, grpc.aio.insecure_channel(house.grpc) as channel:
        ask = pb.GenerateRequest(text=SECRET, parameters=pb.Parameters(max_tokens=2))
        for metadata in ((("x-request-id", "theirs"),), ()):
            async for _ in InferenceStub(channel).Generate(ask, metadata=metadata):
                pass
    first, second = (fields["request"] for _, _, fields in lines(caplog))
    assert first == "theirs"
    assert second.startswith("req_")
