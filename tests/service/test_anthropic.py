"""Anthropic's messages over HTTP: answers, events, errors, keys and counts."""

import asyncio
import json
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ask import Chunk, Finish, TokenOut
from router.config import Settings
from router.core.events import Reason
from router.errors import WIRE, Fault, RequestError
from tests.service.chat_bench import HERMES, MAY_THINK, TemplateService, said, tokenizer
from tests.service.fake_service import FakeFleet, FakeService, words
from tests.service.rest_server import USER, client_of, serving

PATH = "/v1/messages"
TEXT = "Once upon a tîme 🙂"
ASK: dict[str, Any] = {"model": "tgi", "max_tokens": 9, "messages": USER}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris 🗼"}}\n</tool_call>'


def thinker(*pieces: str, reason: Reason = Reason.EOS, template: str = MAY_THINK) -> FakeService:
    """A service whose model has a chat template, and says this."""
    service = TemplateService(said(*pieces, reason=reason))
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(template)
    return service


async def ask(service: FakeService, path: str = PATH, **fields: object) -> httpx.Response:
    body = {name: value for name, value in {**ASK, **fields}.items() if value is not ...}
    async with client_of(service) as client:
        return await client.post(path, json=body)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which names its type twice."""
    found = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def folded(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What Anthropic's SDK makes of events: the message as if it had come whole."""
    events = [deepcopy(event) for event in events if event["type"] != "ping"]
    message = events[0]["message"]
    assert (events[0]["type"], message["content"]) == ("message_start", [])
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == (None, 0)
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    content, inputs, open_at = message["content"], dict[int, str](), None
    for event in events[1:-2]:
        at = event["index"]
        match event["type"]:
            case "content_block_start":
                assert open_at is None
                assert at == len(content)
                content.append(event["content_block"])
                open_at = at
            case "content_block_stop":
                assert open_at == at
                open_at = None
            case "content_block_delta":
                assert open_at == at
                delta = event["delta"]
                kind = {"text_delta": "text", "thinking_delta": "thinking"}.get(delta["type"])
                if kind is None:
                    assert delta["type"] == "input_json_delta"
                    inputs[at] = inputs.get(at, "") + delta["partial_json"]
                else:
                    content[at][kind] += delta[kind]
    assert open_at is None
    for at, text in inputs.items():
        content[at]["input"] = json.loads(text)
    usage = {**message["usage"], **events[-2]["usage"]}
    return {**message, **events[-2]["delta"], "usage": usage}


def same(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its ids, which are new each time."""
    content = [{**block, "id": "-"} if "id" in block else block for block in message["content"]]
    return {**message, "id": "-", "content": content}


async def test_a_whole_answer() -> None:
    service = FakeService(words(reason=Reason.EOS))
    answer = await ask(service)
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "m/one",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 5,
            "service_tier": "standard",
        },
    }
    assert "x-ignored-parameters" not in answer.headers
    (seen,) = service.asks
    assert seen.prompt == "<user>Hi</><assistant>"
    assert not seen.add_special_tokens
    assert (seen.params.max_tokens, seen.params.temperature, seen.priority) == (9, 1.0, 1)


async def test_the_same_as_events() -> None:
    answer = await ask(FakeService(words(reason=Reason.EOS)), stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * 5,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[3]["delta"] == {"type": "text_delta", "text": "Once"}
    whole = (await ask(FakeService(words(reason=Reason.EOS)))).json()
    assert same(folded(events)) == same(whole)


async def test_thoughts_text_and_calls_are_blocks_in_their_order() -> None:
    pieces = ("<think>", "Paris, I ", "think.", "</think>", "Let me ", "look. ", CALL)
    whole = (await ask(thinker(*pieces), tools=[TOOL])).json()
    thoughts, text, call = whole["content"]
    assert thoughts == {"type": "thinking", "thinking": "Paris, I think.", "signature": ""}
    assert text["type"] == "text"
    assert text["text"].strip() == "Let me look."
    assert call.pop("id").startswith("toolu_")
    assert call == {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris 🗼"}}
    assert whole["stop_reason"] == "tool_use"
    streamed = events_of((await ask(thinker(*pieces), tools=[TOOL], stream=True)).text)
    whole["content"][2]["id"] = "-"
    assert same(folded(streamed)) == same(whole)
    begun = next(e for e in streamed if e["type"] == "content_block_start" and e["index"] == 2)
    assert begun["content_block"]["input"] == {}


@given(st.data())
def test_any_pieces_make_the_same_blocks(data: st.DataObject) -> None:
    text = f"<think>So: 🙂</think>Let me look.{CALL}{CALL.replace('Paris', 'Rome')}"
    cuts = data.draw(st.sets(st.integers(1, len(text) - 1), max_size=12))
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    finish = Finish(Reason.EOS, text, 7, 9)
    last = len(pieces) - 1
    script = [Chunk((), p, finish if at == last else None) for at, p in enumerate(pieces)]

    async def both() -> tuple[dict[str, Any], dict[str, Any]]:
        services = [TemplateService(script), TemplateService(script)]
        for service in services:
            service.fleet = FakeFleet()
            service.fleet.tokenizer = tokenizer(MAY_THINK)
        whole = (await ask(services[0], tools=[TOOL])).json()
        stream = await ask(services[1], tools=[TOOL], stream=True)
        return same(whole), same(folded(events_of(stream.text)))

    whole, streamed = asyncio.run(both())
    assert whole == streamed
    assert [block["type"] for block in whole["content"]] == [
        *("thinking", "text", "tool_use", "tool_use")
    ]
    cities = [block["input"]["city"] for block in whole["content"][2:]]
    assert cities == ["Paris 🗼", "Rome 🗼"]


async def test_a_call_that_is_cut_short_has_no_input() -> None:
    pieces = ("Well", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa')
    service = thinker(*pieces, reason=Reason.LENGTH)
    whole = (await ask(service, tools=[TOOL])).json()
    assert whole["stop_reason"] == "max_tokens"
    assert [block["input"] for block in whole["content"] if block["type"] == "tool_use"] == [{}]


async def test_thoughts_can_be_left_out() -> None:
    pieces = ("<think>", "Hm.", "</think>", "Yes.")
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    whole = (await ask(thinker(*pieces), thinking=thinking)).json()
    assert whole["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    streamed = await ask(thinker(*pieces), thinking=thinking, stream=True)
    assert same(folded(events_of(streamed.text))) == same(whole)


async def test_an_answer_without_text_has_no_blocks() -> None:
    finish = Finish(Reason.EOS, "", 7, 1)
    service = FakeService([Chunk((TokenOut(0, "</s>", True),), "", finish)])
    assert (await ask(service)).json()["content"] == []
    events = events_of((await ask(service, stream=True)).text)
    assert folded(events)["content"] == []


async def test_stop_sequences() -> None:
    finish = Finish(Reason.STOP_STRING, "ab", 7, 2, stop="END")
    service = FakeService([Chunk((), "ab", finish)])
    body = (await ask(service, stop_sequences=["END", "x"])).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    assert service.asks[0].params.stop == ("END", "x")
    assert not service.asks[0].params.include_stop


async def test_what_was_computed_already_is_told_if_caching_is_asked_for() -> None:
    mark = {"type": "ephemeral"}
    block = {"type": "text", "text": "Hi", "cache_control": mark}
    for fields in (
        {"cache_control": mark},
        {"system": [block]},
        {"messages": [{"role": "user", "content": [block]}]},
        {"tools": [{**TOOL, "cache_control": mark}]},
    ):
        usage = (await ask(FakeService(), **fields)).json()["usage"]
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (5, 2)
        events = events_of((await ask(FakeService(), stream=True, **fields)).text)
        assert folded(events)["usage"]["cache_read_input_tokens"] == 2
        assert events[0]["message"]["usage"]["input_tokens"] == 7, "not known yet"


async def test_counting_is_of_the_prompt_that_would_be_computed() -> None:
    counted = await ask(FakeService(), f"{PATH}/count_tokens", max_tokens=..., system="Be brief.")
    assert counted.json() == {"input_tokens": len("<system>Be brief.</><user>Hi</><assistant>")}
    service = thinker("x", template=HERMES)
    with_tools = await ask(service, f"{PATH}/count_tokens", max_tokens=..., tools=[TOOL])
    without = await ask(service, f"{PATH}/count_tokens", max_tokens=...)
    assert with_tools.json()["input_tokens"] > without.json()["input_tokens"]
    assert service.asks == []


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault.VALIDATION, 400, "invalid_request_error"),
        (Fault.UNSUPPORTED, 400, "invalid_request_error"),
        (Fault.TEMPLATE, 400, "invalid_request_error"),
        (Fault.MODEL_NOT_FOUND, 404, "not_found_error"),
        (Fault.OVERLOADED, 529, "overloaded_error"),
        (Fault.UNAVAILABLE, 503, "api_error"),
        (Fault.DEADLINE, 504, "timeout_error"),
        (Fault.WORKER_LOST, 503, "api_error"),
        (Fault.ENGINE_FAILED, 500, "api_error"),
        (Fault.INTERNAL, 500, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_its_status(fault: Fault, status: int, kind: str, stream: bool) -> None:
    service = FakeService()
    service.refusal = RequestError(fault, "`inputs` tokens + `max_new_tokens` is too much")
    answer = await ask(service, stream=stream)
    assert answer.status_code == status
    body = answer.json()
    assert body["type"] == "error"
    message = "`messages` tokens + `max_tokens` is too much"
    assert body["error"] == {"type": kind, "message": message}
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == (WIRE[fault].retry_after_s is not None)


async def test_after_the_first_event_an_error_is_one_more() -> None:
    broken = RequestError(Fault.WORKER_LOST, "the worker was lost")
    service = FakeService([*words()[:2], broken])
    answer = await ask(service, stream=True)
    assert answer.status_code == 200
    *events, last = events_of(answer.text)
    assert [event["type"] for event in events][-1] == "content_block_delta"
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": "the worker was lost"},
        "request_id": answer.headers["request-id"],
    }
    assert (await ask(FakeService([*words()[:2], broken]))).status_code == 503


async def test_what_is_no_request_is_told_in_anthropics_way() -> None:
    async with client_of(FakeService()) as client:
        answers = [
            (await client.post(PATH, content=b"{"), 400, "invalid_request_error"),
            (await client.post(PATH, content=b"a=b", headers={"content-type": "x/y"}), 415, ...),
            (await client.post(PATH, json=[]), 400, "invalid_request_error"),
            (await client.get(PATH), 405, "invalid_request_error"),
            (await client.post(f"{PATH}/batches", json={}), 404, "not_found_error"),
        ]
        for answer, status, kind in answers:
            assert answer.status_code == status
            body = answer.json()
            assert (body["type"], set(body)) == ("error", {"type", "error", "request_id"})
            assert kind in (..., body["error"]["type"])
    async with client_of(FakeService(), Settings(payload_limit=10)) as client:
        large = await client.post(PATH, json=ASK)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


async def test_a_key_may_come_bare_or_as_a_bearer() -> None:
    async with client_of(FakeService(), Settings(api_key="secret")) as client:

        async def status(path: str = PATH, **headers: str) -> int:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await client.post(path, json=ASK, headers=sent)
            if answer.status_code == 401:
                assert answer.json()["error"]["type"] == "authentication_error"
            return answer.status_code

        for path in (PATH, f"{PATH}/count_tokens"):
            assert await status(path, x_api_key="secret") == 200
            assert await status(path, authorization="Bearer secret") == 200
            assert await status(path, authorization="Bearer other", x_api_key="secret") == 200
            assert await status(path, x_api_key="Bearer secret") == 401
            assert await status(path, x_api_key="secrets") == 401
            assert await status(path, authorization="Basic secret") == 401
            assert await status(path) == 401


async def test_silence_is_filled_with_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.api.rest.presence.KEEP_ALIVE_S", 0.01)
    gate, steps = asyncio.Event(), words()
    text = ""
    async with (
        asyncio.timeout(10),
        serving(FakeService([steps[0], gate, *steps[1:]])) as url,
        httpx.AsyncClient(base_url=url) as client,
        client.stream("POST", PATH, json={**ASK, "stream": True}) as answer,
    ):
        async for piece in answer.aiter_text():
            text += piece
            if text.count("event: ping") > 2:
                gate.set()
    assert folded(events_of(text))["content"] == [{"type": "text", "text": TEXT}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(stream: bool) -> None:
    service = FakeService([*words()[:2], asyncio.Event()])
    async with serving(service) as url, asyncio.timeout(10):
        async with httpx.AsyncClient(base_url=url) as client:
            request = client.build_request("POST", PATH, json={**ASK, "stream": stream})
            sent = asyncio.create_task(client.send(request, stream=True))
            await service.waiting.wait()
            if stream:
                await (await sent).aclose()
            sent.cancel()
            await asyncio.wait([sent])
        await service.left.wait()
        assert (service.open, service.cancelled) == (0, 1)
