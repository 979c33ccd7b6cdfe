import asyncio
from typing import Any

import httpx
import openai
import pytest

from router.ask import Chunk, Finish, TokenOut
from router.config import Settings
from router.core.events import Reason
from router.errors import Fault, RequestError
from tests.service.fake_service import FakeService, Step, byte_tokenizer, events_of, words
from tests.service.rest_server import USER, chat, serving

TEXT = "Once upon a tîme 🙂"


async def test_chat_answers_with_openais_shape() -> None:
    service = FakeService(words(reason=Reason.EOS))
    answer = await chat(service)
    body = answer.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_600_000_000
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "model": "m/one",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    (ask,) = service.asks
    assert ask.prompt == "<user>Hi</><assistant>"
    assert not ask.add_special_tokens
    assert not ask.params.include_stop
    assert not ask.params.logprobs
    assert answer.headers["x-generated-tokens"] == "5"


async def test_chat_streams_with_openais_shape() -> None:
    answer = await chat(FakeService(), stream=True, stream_options={"include_usage": True})
    *events, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert len({event["id"] for event in [*events, usage]}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": "Once", "refusal": None}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert "".join(choice["delta"]["content"] for choice in choices) == TEXT
    assert [choice["finish_reason"] for choice in choices] == [None] * 4 + ["length"]
    assert [event["usage"] for event in events] == [None] * 5
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 12
    plain = events_of((await chat(FakeService(), stream=True)).text)
    assert all("usage" not in event for event in plain[:-1])


async def test_text_that_is_held_back_makes_no_event_but_the_role() -> None:
    finish = Finish(Reason.STOP_STRING, "ab", 1, 4)
    token = TokenOut(1, "?")
    steps: list[Step] = [
        Chunk((token,), ""),
        Chunk((token,), ""),
        Chunk((token,), "ab"),
        Chunk((token,), "", finish),
    ]
    events = events_of((await chat(FakeService(steps), stream=True)).text)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "ab"},
        {},
    ]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


async def test_ids_are_unique() -> None:
    service = FakeService()
    ids = {(await chat(service)).json()["id"] for _ in range(20)}
    assert len(ids) == 20


async def test_chat_logprobs() -> None:
    top = ((5, "é", -0.1), (6, "b", -float("inf")))
    outs = (TokenOut(5, "é", False, -0.1, top), TokenOut(0, "</s>", True, -0.2))
    script = [Chunk(outs, "é", Finish(Reason.EOS, "é", 1, 2))]
    service = FakeService(script)
    entry = {
        "token": "é",
        "logprob": -0.1,
        "bytes": [195, 169],
        "top_logprobs": [
            {"token": "é", "logprob": -0.1, "bytes": [195, 169]},
            {"token": "b", "logprob": -9999.0, "bytes": [98]},
        ],
    }
    whole = await chat(service, logprobs=True, top_logprobs=2)
    expected = {"content": [entry], "refusal": None}
    assert whole.json()["choices"][0]["logprobs"] == expected
    stream = await chat(service, logprobs=True, top_logprobs=2, stream=True)
    assert events_of(stream.text)[0]["choices"][0]["logprobs"] == expected
    assert service.asks[0].params.top_logprobs == 2


async def test_bytes_of_parts_of_characters_are_their_own() -> None:
    first, second = byte_tokenizer().encode("é", add_special_tokens=False)
    top = ((first, "\ufffd", -0.1), (second, "\ufffd", -0.2))
    outs = (TokenOut(first, "", False, -0.1, top), TokenOut(second, "é", False, -0.3))
    service = FakeService([Chunk(outs, "é", Finish(Reason.LENGTH, "é", 1, 2))])
    answer = await chat(service, logprobs=True, top_logprobs=2)
    entries = answer.json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in entries] == [[195], [169]]
    assert [entry["bytes"] for entry in entries[0]["top_logprobs"]] == [[195], [169]]


async def test_n_answers_one_request() -> None:
    service = FakeService(words(("a",)), words(("b",)), words(("c",)))
    body = (await chat(service, n=3, seed=2**64 - 1)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"a", "b", "c"}
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 3
    assert [ask.params.seed for ask in service.asks] == [2**64 - 1, 0, 1]


async def test_n_streams_keep_apart() -> None:
    service = FakeService(words(("a", "b")), words(("c", "d")))
    answer = await chat(service, n=2, stream=True, stream_options={"include_usage": True})
    *events, usage, done = events_of(answer.text)
    texts = {0: "", 1: ""}
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"]["content"]
    assert sorted(texts.values()) == ["ab", "cd"]
    assert usage["usage"]["completion_tokens"] == 4
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failure_of_n_ends_all(stream: bool) -> None:
    never = asyncio.Event()
    service = FakeService([never], [RequestError(Fault.OVERLOADED, "full")])
    answer = await chat(service, n=2, stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert (service.open, service.cancelled) == (0, 1)


async def test_parameters_become_the_routers() -> None:
    service = FakeService()
    fields = {
        "model": "m/one",
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": -0.2,
        "seed": -1,
        "stop": "END",
        "logit_bias": {"5": -100, "6": 1.5},
        "max_tokens": 9,
        "max_completion_tokens": 8,
        "service_tier": "flex",
        "top_k": -1,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "user": "u",
        "unheard_of": 1,
    }
    answer = await chat(service, **fields)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-parameters"] == "unheard_of"
    assert answer.json()["service_tier"] == "flex"
    (ask,) = service.asks
    params = ask.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.05)
    assert (params.frequency_penalty, params.presence_penalty) == (0.1, -0.2)
    assert params.repetition_penalty == 1.2
    assert params.logit_bias == ((5, -100.0), (6, 1.5))
    assert (params.seed, params.stop, params.max_tokens) == (2**64 - 1, ("END",), 8)
    assert (params.min_tokens, params.ignore_eos, params.stop_token_ids) == (2, True, (3,))
    assert (params.include_stop, params.skip_special_tokens) == (True, False)
    assert ask.priority == 2
    await chat(service, temperature=0, seed=3, top_p=0)
    greedy = service.asks[1].params
    assert (greedy.temperature, greedy.seed) == (0, None)
    assert 0 < greedy.top_p < 1e-5


async def test_the_last_message_can_be_continued() -> None:
    service = FakeService()
    messages = [*USER, {"role": "assistant", "content": "It is "}]
    answer = await chat(service, messages=messages, continue_final_message=True)
    assert answer.status_code == 200
    assert service.asks[0].prompt == "<user>Hi</><assistant>It is"
    await chat(service, messages=messages)
    assert service.asks[1].prompt == "<user>Hi</><assistant>It is"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert (await chat(service, **both)).status_code == 400


@pytest.mark.parametrize(
    "fields", [{"continue_final_message": False}, {"add_generation_prompt": True}]
)
async def test_the_last_message_is_answered_where_that_is_said(fields: dict[str, Any]) -> None:
    service = FakeService()
    await chat(service, messages=[*USER, {"role": "assistant", "content": "It is "}], **fields)
    prompt = "<user>Hi</><assistant>It is </><assistant>"
    assert str(service.asks[0].prompt) == prompt


async def test_the_openai_client_works() -> None:
    service = FakeService()
    async with (
        serving(service, Settings(api_key="k")) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(model="tgi", messages=USER, n=2)  # type: ignore[arg-type]
        assert [choice.message.content for choice in whole.choices] == [TEXT, TEXT]
        assert whole.usage is not None
        stream = await client.chat.completions.create(
            model="tgi",
            messages=USER,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert "".join(texts) == TEXT
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 12
        text = await client.completions.create(model="tgi", prompt="x", stream=True)
        assert "".join([part.choices[0].text async for part in text]) == TEXT
        assert [model.id async for model in client.models.list()] == ["m/one"]
        assert (await client.models.retrieve("m/one")).id == "m/one"
        service.scripts = [[*words()[:1], RequestError(Fault.WORKER_LOST, "gone")]]
        broken = await client.chat.completions.create(model="tgi", messages=USER, stream=True)  # type: ignore[arg-type]
        with pytest.raises(openai.APIError, match="gone"):
            [chunk async for chunk in broken]
        with pytest.raises(openai.BadRequestError, match="modalities"):
            await client.chat.completions.create(
                model="tgi",
                messages=USER,  # type: ignore[arg-type]
                modalities=["audio"],
            )
        stranger = client.with_options(api_key="wrong")
        with pytest.raises(openai.AuthenticationError):
            await stranger.completions.create(model="m", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_all_its_answers(stream: bool) -> None:
    never = asyncio.Event()
    service = FakeService([*words()[:2], never])
    async with serving(service) as url, asyncio.timeout(10):
        async with httpx.AsyncClient(base_url=url) as client:
            body = {"messages": USER, "n": 3, "stream": stream}
            call = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while service.open < 3:
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        while service.open:
            await asyncio.sleep(0)
        assert service.cancelled == 3


async def test_a_slow_reader_holds_up_only_itself() -> None:
    big = "x" * 65536
    many = words([big] * 400)
    service = FakeService(many, words())
    async with serving(service) as url, asyncio.timeout(20):
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, port, limit=1024)
        body = b'{"prompt":"x","stream":true}'
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        while service.open < 1:
            await asyncio.sleep(0)
        async with httpx.AsyncClient(base_url=url) as client:
            for _ in range(3):
                answer = await client.post("/v1/completions", json={"prompt": "y"})
                assert answer.json()["choices"][0]["text"] == TEXT
        assert service.open == 1  # 26 MB do not fit into any buffer: it still waits
        writer.close()
        await service.left.wait()
    assert service.open == 0
