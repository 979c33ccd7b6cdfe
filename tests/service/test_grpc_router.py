"""All gRPC services over the real router and a real worker with the scripted engine."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.api import grpc_server
from router.app import Router
from router.config import GroupSpec, Settings
from router.faces import _free_port
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service import foreign, kserve_rig
from tests.service.fakes import PATIENCE_S, bench_in, until
from tests.service.grpc_rig import read
from tests.service.kserve_rig import outputs_of, parameters, raw_request

TGIS = foreign.messages("fmaas", foreign.TGIS)
Talk = Callable[[grpc.aio.Channel, str, int], Any]


@asynccontextmanager
async def house_in(folder: Path, **worker: Any) -> AsyncIterator[tuple[Router, grpc.aio.Channel]]:
    async with asyncio.timeout(3 * PATIENCE_S), bench_in(folder) as bench:
        address = await bench.start("w", **worker)
        settings = Settings(host="127.0.0.1", grpc_port=_free_port("127.0.0.1"))
        async with Router(settings, [GroupSpec("g", None, (address,))]) as router:
            await router.fleet.wait_ready()
            models = router.metrics.models
            server = await grpc_server.start(router.service, router.fleet, settings, models=models)
            target = f"127.0.0.1:{settings.grpc_port}"
            async with grpc.aio.insecure_channel(target) as channel:
                yield router, channel
            await server.stop(0)


def running(router: Router) -> int:
    """Requests that the core has."""
    seen = router.driver._core.snapshot()
    return seen.running + seen.waiting


def inference(channel: grpc.aio.Channel, text: str, tokens: int) -> Any:
    params = pb.Parameters(max_tokens=tokens, temperature=0)
    return InferenceStub(channel).Generate(pb.GenerateRequest(text=text, parameters=params))


def several(channel: grpc.aio.Channel, text: str, tokens: int) -> Any:
    params = pb.Parameters(max_tokens=tokens, temperature=0, n=2)
    return InferenceStub(channel).Generate(pb.GenerateRequest(text=text, parameters=params))


def chat(channel: grpc.aio.Channel, text: str, tokens: int) -> Any:
    params = pb.Parameters(max_tokens=tokens, temperature=0)
    messages = [pb.ChatMessage(role="user", content=text)]
    return InferenceStub(channel).Chat(pb.ChatRequest(messages=messages, parameters=params))


def tgis(channel: grpc.aio.Channel, text: str, tokens: int) -> Any:
    request = TGIS["SingleGenerationRequest"](
        request={"text": text}, params={"stopping": {"max_new_tokens": tokens}}
    )
    path = "/fmaas.GenerationService/GenerateStream"
    return foreign.stream(channel, path, TGIS["GenerationResponse"])(request)


def triton(channel: grpc.aio.Channel, text: str, tokens: int) -> Any:
    given = parameters(max_tokens=tokens, temperature=0, stream=True)
    return kserve_rig.Client(channel).stream(iter([raw_request(text, parameters=given)]))


def triton_text(message: Any) -> str:
    (text,) = outputs_of(message.infer_response)["text_output"]
    return str(text)


async def test_every_service_gives_the_same_answer(tmp_path: Path) -> None:
    async with house_in(tmp_path) as (router, channel):
        text = "".join(m.text for m in await read(inference(channel, "Once upon", 12)))
        assert text
        assert "".join(m.text for m in await read(tgis(channel, "Once upon", 12))) == text
        found = [triton_text(m) for m in await read(triton(channel, "Once upon", 12))]
        assert "".join(found) == text
        texts = {0: "", 1: ""}
        for message in await read(several(channel, "Once upon", 12)):
            texts[message.choice] += message.text
        assert texts == {0: text, 1: text}
        assert running(router) == 0


def texts_of(messages: Sequence[Any]) -> str:
    """The text of a stream of any of the services; of several answers, the first one's."""
    if hasattr(messages[0], "infer_response"):
        return "".join(map(triton_text, messages))
    return "".join(m.text for m in messages if not getattr(m, "choice", 0))


async def test_sixty_four_streams_of_all_kinds_lose_and_mix_nothing(tmp_path: Path) -> None:
    async with house_in(tmp_path) as (router, channel):
        prompts = [f"Story {number}:" for number in range(16)]
        alone = [
            texts_of(await read(inference(channel, prompt, 5 + number)))
            for number, prompt in enumerate(prompts)
        ]
        assert len(set(alone)) == len(alone)
        talks = [
            read(talk(channel, prompt, 5 + number))
            for talk in (inference, several, tgis, triton)
            for number, prompt in enumerate(prompts)
        ]
        assert [texts_of(found) for found in await asyncio.gather(*talks)] == 4 * alone
        assert running(router) == 0


@pytest.mark.parametrize("talk", [inference, several, chat, tgis, triton])
async def test_leaving_ends_the_request_in_the_core(
    tmp_path: Path, talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    async with house_in(tmp_path, step_ms="1") as (router, channel):
        for _ in range(20):  # whether a message is on its way just then is a matter of chance
            call = talk(channel, "Once upon", 1000)
            await call.read()
            await until(lambda: running(router) > 0)
            call.cancel()
            await until(lambda: running(router) == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_time_limit_of_tgis_ends_with_what_there_is(tmp_path: Path) -> None:
    async with house_in(tmp_path, step_ms="5") as (router, channel):
        request = TGIS["BatchedGenerationRequest"](
            requests=[{"text": "Once"}, {"text": "Twice"}],
            params={"stopping": {"max_new_tokens": 1500, "time_limit_millis": 500}},
        )
        path = "/fmaas.GenerationService/Generate"
        answer = await foreign.unary(channel, path, TGIS["BatchedGenerationResponse"])(request)
        for one in answer.responses:
            assert one.stop_reason == foreign.TIME_LIMIT
            assert 0 < one.generated_token_count < 1500
            assert one.text
        assert running(router) == 0


async def test_triton_is_told_what_became_of_the_requests_of_all_services(tmp_path: Path) -> None:
    began_ms = time.time_ns() // 1_000_000
    async with house_in(tmp_path, step_ms="2") as (router, channel):
        await asyncio.gather(*(read(talk(channel, "Once", 20)) for talk in (inference, triton)))
        left = chat(channel, "Once", 1000)
        await left.read()
        left.cancel()
        await until(lambda: running(router) == 0)
        client = kserve_rig.Client(channel)
        answer = await client.ask("ModelStatistics", "ModelStatisticsResponse")
    (found,) = answer.model_stats
    assert began_ms <= found.last_inference <= time.time_ns() // 1_000_000
    whole = found.inference_stats
    assert found.inference_count == whole.success.count == 2
    assert whole.fail.count == 1
    assert whole.queue.count == whole.compute_infer.count == 2
    assert whole.queue.ns + whole.compute_infer.ns == pytest.approx(whole.success.ns, abs=2)
    assert whole.compute_infer.ns >= 2 * 19 * 2_000_000  # two answers of twenty steps of 2 ms
    assert not whole.HasField("compute_input")
    sizes = {one.batch_size: one.compute_infer for one in found.batch_stats}
    assert list(sizes) == [1, 2]
    assert sum(one.count for one in sizes.values()) == found.execution_count >= 20
    assert sum(one.ns for one in sizes.values()) >= 19 * 2_000_000


async def test_chats_are_laid_out_and_scored_prompts_come_whole(tmp_path: Path) -> None:
    async with house_in(tmp_path) as (_, channel):
        messages = await read(chat(channel, "Hi", 5))
        assert "".join(message.text for message in messages)
        params = pb.Parameters(max_tokens=2, prompt_logprobs=True, top_logprobs=1)
        stub = InferenceStub(channel)
        request = pb.GenerateRequest(text="abc", parameters=params)
        finish = (await read(stub.Generate(request)))[-1].finish
        assert len(finish.prompt) == finish.prompt_tokens
        first, *others = finish.prompt
        assert not first.HasField("logprob")
        assert others
        assert all(token.logprob < 0 for token in others)
        request = TGIS["SingleGenerationRequest"](
            request={"text": "abc"},
            params={"response": {"input_tokens": True, "token_logprobs": True}},
        )
        path = "/fmaas.GenerationService/GenerateStream"
        answers = await read(foreign.stream(channel, path, TGIS["GenerationResponse"])(request))
        found = [token.logprob for token in answers[0].input_tokens]
        assert found[1:] == [pytest.approx(token.logprob) for token in others]


async def test_ranks_are_exact_for_prompts_and_answers(tmp_path: Path) -> None:
    """Both services tell the same; where the likeliest tokens reach far enough, these agree."""
    likeliest = 20
    async with house_in(tmp_path) as (_, channel):
        params = pb.Parameters(
            max_tokens=30, temperature=9, seed=3, ranks=True, prompt_logprobs=True,
            logprobs=True, top_logprobs=likeliest,
        )  # fmt: skip
        request = pb.GenerateRequest(text="Once upon", parameters=params)
        messages = await read(InferenceStub(channel).Generate(request))
        tokens = [token for message in messages for token in message.token_ids]
        ranks = [rank for message in messages for rank in message.ranks]
        tops = [list(top.token_ids) for message in messages for top in message.top_logprobs]
        prompt = messages[-1].finish.prompt
        assert not prompt[0].HasField("rank")
        told = [
            *zip(tokens, ranks, tops, strict=True),
            *((token.id, token.rank, list(token.top.token_ids)) for token in prompt[1:]),
        ]
        for token, rank, top in told:
            assert rank == top.index(token) + 1 if token in top else rank > likeliest
        assert min(ranks) <= likeliest < max(ranks)
        request = TGIS["SingleGenerationRequest"](
            request={"text": "Once upon"},
            params={
                "method": 1,
                "sampling": {"temperature": 9, "seed": 3},
                "stopping": {"max_new_tokens": 30},
                "response": {"input_tokens": True, "generated_tokens": True, "token_ranks": True},
            },
        )
        path = "/fmaas.GenerationService/GenerateStream"
        answers = await read(foreign.stream(channel, path, TGIS["GenerationResponse"])(request))
        assert [token.rank for one in answers for token in one.tokens] == ranks
        found = [token.rank for token in answers[0].input_tokens]
        assert found == [0, *(token.rank for token in prompt[1:])]


async def test_tools_are_called_over_grpc(tmp_path: Path) -> None:
    """The engine says what a model would; what it means comes typed."""
    said = '[{"name": "sum", "arguments": {"a": 1, "b": [2]}}]'
    async with house_in(tmp_path, answer=said) as (_, channel):
        schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role="user", content="Add 1 and 2.")],
            tools=[pb.Tool(name="sum", description="Adds.", parameters=schema)],
            parameters=pb.Parameters(temperature=0),
        )
        messages = await read(InferenceStub(channel).Chat(request))
    finish = messages[-1].finish
    assert finish.reason == pb.FINISH_REASON_TOOL_CALLS
    (call,) = finish.tool_calls
    assert call.name == "sum"
    deltas = [delta for message in messages for delta in message.tool_calls]
    assert [delta.name for delta in deltas if delta.name] == ["sum"]
    assert "".join(delta.arguments for delta in deltas) == call.arguments
    assert call.arguments.replace(" ", "") == '{"a":1,"b":[2]}'
