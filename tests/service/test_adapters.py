"""LoRA adapters through every protocol, over the real router and a worker that has two."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import openai
import pytest

from router.config import GroupSpec, Settings
from router.core.effects import Admit
from router.described import card_of
from router.fleet import Fleet, MismatchError
from router.link import encode
from router.text.tokenizer import Tokenizer
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from shards.engines.scripted_text import Script
from shards.v1 import shard_pb2
from tests.service.fakes import plan_for
from tests.service.test_group_fleet import card, said
from tests.service.test_rest_router import House, house_in

PROMPT = "Once upon a time there was a small engine that could not climb"
KNOWN = "adapters of m: prose, verse"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, {"adapters": ("prose", "verse")}) as house:
        yield house


async def tgi(house: House, adapter: str | None, prompt: str = PROMPT) -> str:
    parameters = {"max_new_tokens": 6, "adapter_id": adapter}
    answer = await house.post("/generate", {"inputs": prompt, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


async def complete(house: House, model: str | None) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "model": model}
    answer = await house.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def over_grpc(house: House, **fields: str) -> str:
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        parameters = pb.Parameters(max_tokens=6, temperature=0.0)
        request = pb.GenerateRequest(text=PROMPT, parameters=parameters, **fields)
        answer = InferenceStub(channel).Generate(request)
        return "".join([message.text async for message in answer])


async def test_all_protocols_reach_the_same_adapter(house: House) -> None:
    base, verse, prose = [await tgi(house, name) for name in (None, "verse", "prose")]
    assert len({base, verse, prose}) == 3
    assert await tgi(house, "") == base
    for name, expected in (("verse", verse), ("prose", prose), ("m", base)):
        body = await complete(house, name)
        assert (body["choices"][0]["text"], body["model"]) == (expected, name)
        assert await over_grpc(house, model=name) == expected
    for name in (None, "", "tgi", "dummy", f"{house.url}/v1/"):
        body = await complete(house, name)
        assert (body["choices"][0]["text"], body["model"]) == (base, "m")
    assert await over_grpc(house, adapter="verse") == verse
    assert await over_grpc(house) == base


async def test_chat_with_an_adapter(house: House) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
    answers = {}
    for name in ("m", "verse"):
        whole = (await house.post("/v1/chat/completions", {**body, "model": name})).json()
        assert whole["model"] == name
        answers[name] = whole["choices"][0]["message"]["content"]
        stream = await house.post("/v1/chat/completions", {**body, "model": name, "stream": True})
        assert f'"model":"{name}"' in stream.text
    assert answers["m"] != answers["verse"]
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        for fields in ({"adapter": "verse"}, {"model": "verse"}):
            request = pb.ChatRequest(
                messages=[pb.ChatMessage(role="user", content="Hi")],
                parameters=pb.Parameters(max_tokens=6, temperature=0.0),
                **fields,
            )
            answer = InferenceStub(channel).Chat(request)
            assert "".join([message.text async for message in answer]) == answers["verse"]


async def test_answers_do_not_mix_where_prompts_agree(house: House) -> None:
    """The same prompt, again and again: what is shared is never another adapter's."""
    names = (None, "verse", "prose")
    first = [await tgi(house, name) for name in names]
    for _ in range(2):
        assert [await tgi(house, name) for name in names] == first
    assert house.snapshot.prefix_hit_tokens > 0


async def test_an_unknown_adapter_is_refused_by_name(house: House) -> None:
    body = {"inputs": "x", "parameters": {"adapter_id": "rhyme"}}
    for path in ("/generate", "/generate_stream", "/"):
        answer = await house.post(path, body)
        assert answer.status_code == 422
        assert answer.json() == {
            "error": f"Input validation error: `adapter_id` 'rhyme' is not loaded; {KNOWN}",
            "error_type": "validation",
        }
    answer = await house.post("/v1/completions", {"prompt": "x", "model": "rhyme"})
    assert answer.status_code == 404
    assert "there is: m, prose, verse" in answer.json()["error"]["message"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await over_grpc(house, adapter="rhyme")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert KNOWN in (caught.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await over_grpc(house, model="verse", adapter="prose")
    assert "the model is the adapter verse, but" in (caught.value.details() or "")
    assert house.snapshot.admitted_tokens == 0


async def test_a_model_without_adapters_says_so(tmp_path: Path) -> None:
    async with house_in(tmp_path) as house:
        body = {"inputs": "x", "parameters": {"adapter_id": "verse"}}
        answer = await house.post("/generate", body)
        assert answer.status_code == 422
        assert "adapters of m: none" in answer.json()["error"]


async def test_adapters_are_listed_with_their_parent(house: House) -> None:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="-") as client:
        listed = [model async for model in client.models.list()]
        assert [model.id for model in listed] == ["m", "prose", "verse"]
        assert [getattr(model, "parent", None) for model in listed] == [None, "m", "m"]
        one = await client.models.retrieve("verse")
        assert (one.id, one.owned_by, getattr(one, "parent", None)) == ("verse", "m", "m")
    async with grpc.aio.insecure_channel(house.grpc) as channel:
        (model,) = (await InferenceStub(channel).ListModels(pb.ListModelsRequest())).models
        assert list(model.adapters) == list(model.groups[0].adapters) == ["prose", "verse"]


def test_an_admit_names_its_adapter_on_the_wire() -> None:
    admit = Admit(7, (1, 2), 2, 0, 0, None, "verse")
    plan = replace(plan_for(1, 1), admits=(admit,))
    assert shard_pb2.Plan.FromString(encode(plan)).admits[0].adapter == "verse"


def test_what_the_fleet_knows_of_adapters() -> None:
    specs = [GroupSpec(name, None, (f"unix:///{name}",)) for name in ("g", "h", "i")]
    fleet = Fleet(Settings(), specs)
    tokenizer = Tokenizer.from_files(Script().files())
    fleet.up(card("g", adapters=["prose"]), tokenizer)
    fleet.up(card("h", adapters=["verse", "prose"]), tokenizer)
    fleet.up(card("i", model_id="n", adapters=["verse", "m"]), tokenizer)
    assert fleet.model("m").adapters == ("prose", "verse")
    assert fleet.model("prose").id == fleet.model("verse").id == "m"
    assert [fleet.adapter(name) for name in ("prose", "verse")] == ["prose", "verse"]
    # A model's own name comes first, and no name stands for an adapter of nobody.
    assert [fleet.adapter(name) for name in ("m", "n", "rhyme", "tgi", "", None)] == [""] * 6


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        (
            [said(world=2, adapters=["a"]), said(rank=1, world=2)],
            "the ranks differ in their adapters",
        ),
        ([said(adapters=["m"])], "an adapter is called m, as the model is"),
    ],
)
def test_adapters_that_cannot_be_served(
    ranks: list[shard_pb2.DescribeResponse], cause: str
) -> None:
    with pytest.raises(MismatchError, match=cause):
        card_of(GroupSpec("g", None, ("unix:///g",)), ranks)
