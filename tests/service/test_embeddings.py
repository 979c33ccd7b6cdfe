"""Embeddings over REST and gRPC, the real router and workers in this process."""

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import openai
import pytest

from router.app import Router
from router.ask import EmbedAsk
from router.config import GroupSpec, Settings
from router.core.effects import Abandon
from router.described import card_of
from router.errors import Fault, RequestError
from router.fleet import Fleet
from router.text.tokenizer import Tokenizer
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from shards.engines.scripted_text import Script
from tests.engines.skilled import EMBED_TOKENS_MAX, vector_of
from tests.service.fakes import PATIENCE_S, Bench, GatedEngine, bench_in, until
from tests.service.test_group_fleet import card, said
from tests.service.test_rest_router import GATEWAY, ROUTER, House, house_in

SKILLED = {"adapters": ("verse",)}


def tokens_of(text: str) -> list[int]:
    return Script().encode(text)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, SKILLED) as house:
        yield house


async def embed(house: House, given: Any, **fields: Any) -> httpx.Response:
    return await house.post("/v1/embeddings", {"input": given, **fields})


def vectors(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ("a cat", [tokens_of("a cat")]),
        (["a cat", "dogs"], [tokens_of("a cat"), tokens_of("dogs")]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2, 3], [4]], [[1, 2, 3], [4]]),
    ],
)
async def test_every_form_of_input(house: House, given: Any, tokens: list[list[int]]) -> None:
    answer = await embed(house, given)
    assert vectors(answer) == [pytest.approx(vector_of(ids), abs=1e-6) for ids in tokens]
    body = answer.json()
    count = sum(map(len, tokens))
    assert (body["object"], body["model"]) == ("list", "m")
    assert body["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert {entry["object"] for entry in body["data"]} == {"embedding"}


async def test_as_many_inputs_as_openai_takes(house: House) -> None:
    given = [[number % 50 + 1, number // 50 + 1] for number in range(2048)]
    answer = await embed(house, given)
    assert vectors(answer) == [pytest.approx(vector_of(ids), abs=1e-6) for ids in given]
    assert answer.json()["usage"]["prompt_tokens"] == 4096


async def test_base64_is_of_little_endian_floats(house: House) -> None:
    (text,) = vectors(await embed(house, [1, 2, 3], encoding_format="base64"))
    floats = struct.unpack("<3f", base64.b64decode(text))
    assert list(floats) == pytest.approx(vector_of([1, 2, 3]), abs=1e-6)


async def test_openais_client(house: House) -> None:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="-") as client:
        for more in ({}, {"encoding_format": "float"}):
            found = await client.embeddings.create(model="m", input=["a cat", "dogs"], **more)
            assert [one.embedding for one in found.data] == [
                pytest.approx(vector_of(tokens_of(text)), abs=1e-6) for text in ("a cat", "dogs")
            ]
            assert found.usage.prompt_tokens == len(tokens_of("a cat") + tokens_of("dogs"))
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(model="m", input="x", dimensions=2)
        assert (caught.value.param, caught.value.code) == ("dimensions", "unsupported_parameter")
        whole = await client.embeddings.create(model="m", input="x", user="u")
        size = len(whole.data[0].embedding)
        same = await client.embeddings.create(model="m", input="x", dimensions=size)
        assert same.data == whole.data
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="n", input="x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`input` must have 1 to 2048 entries. Given: 0"),
        ("", "`input` holds an empty entry"),
        (["a", ""], "`input` holds an empty entry"),
        ([[1], []], "`input` holds an empty entry"),
        ([1] * (EMBED_TOKENS_MAX + 1), "`input` entry 0 must have 1 to 16 tokens. Given: 17"),
        (["a", "b" * 40], "`input` entry 1 must have 1 to 16 tokens. Given: 40"),
        ([-1], "`input` holds the token id -1"),
        ([1 << 20], "`input` holds the token id 1048576"),
        (["a"] * 2049, "`input` must have 1 to 2048 entries. Given: 2049"),
        (7, "`input`"),
        ([["a"]], "`input"),
    ],
)
async def test_a_faulty_input_is_named(house: House, given: Any, message: str) -> None:
    answer = await embed(house, given)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith("input")
    assert error["type"] == "invalid_request_error"
    assert house.bench.engines["w"].batches == []


async def test_an_unknown_encoding_is_refused(house: House) -> None:
    answer = await embed(house, "x", encoding_format="int8")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "encoding_format"


async def test_over_grpc(house: House) -> None:
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        stub = InferenceStub(channel)
        inputs = [pb.EmbedInput(text="a cat"), pb.EmbedInput(token_ids=pb.TokenIds(ids=[1, 2]))]
        answer = await stub.Embed(pb.EmbedRequest(inputs=inputs))
        expected = [vector_of(tokens_of("a cat")), vector_of([1, 2])]
        assert [list(one.values) for one in answer.embeddings] == [
            pytest.approx(vector, abs=1e-6) for vector in expected
        ]
        assert answer.prompt_tokens == len(tokens_of("a cat")) + 2
        for request, code in (
            (pb.EmbedRequest(), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.EmbedRequest(inputs=[pb.EmbedInput()]), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.EmbedRequest(model="n", inputs=inputs), grpc.StatusCode.NOT_FOUND),
            (pb.EmbedRequest(model="verse", inputs=inputs), grpc.StatusCode.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Embed(request)
            assert caught.value.code() is code


async def test_an_engine_without_embeddings_is_named(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house:
        answer = await embed(house, "x")
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert "engine scripted, which does not support embeddings" in error["message"]
        assert error["code"] == "unsupported_parameter"


async def test_an_adapter_does_not_embed(house: House) -> None:
    answer = await embed(house, "x", model="verse")
    assert answer.status_code == 400
    assert "embeddings are made by the model itself: name m" in answer.json()["error"]["message"]


async def test_a_client_that_leaves_frees_the_worker(house: House) -> None:
    gate, engine = house.bench.gates["w"], house.bench.engines["w"]
    gate.clear()
    held = asyncio.create_task(embed(house, [1]))
    await until(lambda: engine.begun == 1)
    leaving = asyncio.create_task(embed(house, [[2], [3] * 16]))
    queue = house.bench.worker("w")._engine.embeds
    await until(lambda: queue._waiting)
    leaving.cancel()
    await until(lambda: all(job.over for job in queue._waiting))
    gate.set()
    await held
    vectors(await embed(house, [4]))
    assert engine.batches == [[[1]], [[4]]]


async def test_the_deadline_of_a_request(tmp_path: Path) -> None:
    async with house_in(tmp_path, SKILLED, request_deadline_s=0.05) as house:
        house.bench.gates["w"].clear()
        answer = await embed(house, [1])
        house.bench.gates["w"].set()
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"


async def test_a_client_of_grpc_sets_its_own_deadline(house: House) -> None:
    house.bench.gates["w"].clear()
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        request = pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceStub(channel).Embed(request, timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    engine = house.bench.worker("w")._engine.embeds
    house.bench.gates["w"].set()
    await until(lambda: engine._current is None)


async def test_too_many_requests_are_refused_at_once(tmp_path: Path) -> None:
    async with house_in(tmp_path, SKILLED, max_concurrent_requests=1) as house:
        engine = house.bench.engines["w"]
        house.bench.gates["w"].clear()
        held = asyncio.create_task(embed(house, [1]))
        await until(lambda: engine.begun == 1)
        refused = await embed(house, [2])
        house.bench.gates["w"].set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        vectors(await held)
        vectors(await embed(house, [2]))


async def test_generation_goes_on_beside_many_embeddings(house: House) -> None:
    expected = await house.text_of("Once upon a time", 30)
    asks = [embed(house, [[n % 90 + 1] * 16 for n in range(50)]) for _ in range(4)]
    *answers, text = await asyncio.gather(*asks, house.text_of("Once upon a time", 30))
    assert text == expected
    assert [len(vectors(answer)) for answer in answers] == [50] * 4


class Pair:
    """A router over two workers of one model, both of which embed."""

    def __init__(self, router: Router, bench: Bench) -> None:
        self.router = router
        self.bench = bench

    async def embed(self, *inputs: tuple[int, ...]) -> list[list[float]]:
        found = await self.router.service.embed(EmbedAsk(inputs))
        return [list(vector) for vector in found.vectors]


@asynccontextmanager
async def pair_in(folder: Path) -> AsyncIterator[Pair]:
    async with asyncio.timeout(60), bench_in(folder) as bench:
        specs = []
        for name in ("a", "b"):
            address = await bench.start(name, adapters=("verse",))
            specs.append(GroupSpec(name, None, (address,)))
        async with Router(Settings(), specs) as router:
            await until(lambda: all(router.fleet.groups_up().values()))
            yield Pair(router, bench)


async def test_the_group_with_fewest_requests_embeds(tmp_path: Path) -> None:
    async with pair_in(tmp_path) as pair:
        gates, engines = pair.bench.gates.values(), pair.bench.engines.values()
        for gate in gates:
            gate.clear()
        held = [asyncio.create_task(pair.embed((n,))) for n in (1, 2)]
        await until(lambda: [engine.begun for engine in engines] == [1, 1])
        for gate in gates:
            gate.set()
        assert await asyncio.gather(*held) == [
            [pytest.approx(vector_of([n]), abs=1e-6)] for n in (1, 2)
        ]


async def test_a_worker_that_dies_is_replaced_by_another(tmp_path: Path) -> None:
    async with pair_in(tmp_path) as pair:
        for gate in pair.bench.gates.values():
            gate.clear()
        held = asyncio.create_task(pair.embed((1,)))
        engines = pair.bench.engines
        await until(lambda: sum(engine.begun for engine in engines.values()) == 1)
        dying, other = sorted(engines, key=lambda name: -engines[name].begun)
        pair.bench.gates[other].set()
        await pair.bench.kill(dying)
        assert await held == [pytest.approx(vector_of([1]), abs=1e-6)]
        assert engines[other].batches == [[[1]]]
        await pair.bench.kill(other)
        await until(lambda: not any(pair.router.fleet.groups_up().values()))
        with pytest.raises(RequestError) as caught:
            await pair.embed((1,))
        assert caught.value.fault is Fault.UNAVAILABLE


async def test_a_group_that_is_given_up_is_not_taken_for_a_client_that_leaves(
    house: House,
) -> None:
    engine, (group,) = house.bench.engines["w"], house.router.groups._groups.values()
    house.bench.gates["w"].clear()
    held = asyncio.create_task(embed(house, [1]))
    await until(lambda: engine.begun == 1)
    assert group._life is not None
    group.abandon(Abandon("g", group._life.epoch, "given up"))
    answer = await held
    house.bench.gates["w"].set()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("made", [[], [[float("nan")]], [[float("inf")]], [[1.0], [1.0]]])
async def test_what_is_no_vector_is_not_passed_on(
    house: House, monkeypatch: pytest.MonkeyPatch, made: list[list[float]]
) -> None:
    monkeypatch.setattr(GatedEngine, "embed", lambda *_: made)
    answer = await embed(house, [1])
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_failed"


async def test_nothing_is_taken_while_shutting_down(house: House) -> None:
    await house.router.driver.drain(0)
    answer = await embed(house, [1])
    assert answer.status_code == 503


@pytest.mark.parametrize("through", [ROUTER, GATEWAY])
async def test_one_that_runs_may_end_in_a_drain(tmp_path: Path, through: str) -> None:
    async with house_in(tmp_path, SKILLED, through=through) as house:
        driver, engine = house.router.driver, house.bench.engines["w"]
        engine.gate.clear()
        asked = asyncio.create_task(embed(house, "a cat"))
        await until(lambda: engine.begun)
        drained = asyncio.create_task(driver.drain(PATIENCE_S))
        await until(lambda: not driver.accepting)
        assert driver.open_requests == 1
        engine.gate.set()
        assert (await asked).status_code == 200
        await drained
        assert driver.open_requests == 0


async def test_the_documentation_has_the_route(house: House) -> None:
    document = (await house.client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/embeddings"]["post"]
    ref = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert ref.endswith("/EmbeddingRequest")
    assert "input" in document["components"]["schemas"]["EmbeddingRequest"]["required"]


def test_what_the_fleet_knows_of_embeddings() -> None:
    async def call(_: object) -> list[list[float]]:
        raise AssertionError("nobody asks")

    skilled = {"features": ["embeddings"]}
    specs = [GroupSpec(name, None, (f"unix:///{name}",)) for name in ("g", "h", "i")]
    fleet = Fleet(Settings(), specs)
    tokenizer = Tokenizer.from_files(Script().files())
    fleet.up(card("g"), tokenizer, call)
    assert fleet.model("m").embed_tokens_max == 0
    fleet.up(card("h", **skilled, embed_tokens_max=64), tokenizer, call)
    fleet.up(card("i", **skilled, embed_tokens_max=32), tokenizer, call)
    assert fleet.model("m").embed_tokens_max == 32
    assert list(fleet.embed_calls("m")) == ["h", "i"]
    assert fleet.embed_calls("n") == {}
    fleet.down("h")
    assert list(fleet.embed_calls("m")) == ["i"]


def test_a_group_of_several_ranks_does_not_embed() -> None:
    ranks = [
        said(rank=rank, world=2, features=["embeddings"], embed_tokens_max=64) for rank in (0, 1)
    ]
    joined = card_of(GroupSpec("g", None, ("unix:///g",)), ranks)
    assert "embeddings" not in joined.features
    assert joined.embed_tokens_max == 0
