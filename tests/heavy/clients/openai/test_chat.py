"""The openai package: chat completions, plain, streamed and as many."""

from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.heavy.clients.world import TEXTS, USER
from tests.system.server import Server

pytestmark = pytest.mark.both_ways

CHAT: dict[str, Any] = {"model": "tgi", "messages": USER, "max_tokens": 24, "temperature": 0}


def test_an_answer(client: OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == server.model
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert "Paris" in str(choice.message.content)
    assert not choice.message.tool_calls
    assert choice.logprobs is None
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    assert client.chat.completions.create(**CHAT).id != answer.id


def test_a_stream_says_the_same(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in (*chunks, last)}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_the_streaming_helper_gathers_it(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    with client.chat.completions.stream(**CHAT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.repeatable
def test_several_answers(client: OpenAI) -> None:
    fields = {**CHAT, "temperature": 1.2, "seed": 3, "n": 3, "max_tokens": 8}
    answer = client.chat.completions.create(**fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert [streamed[index] for index in range(3)] == texts


def test_log_probabilities(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=20)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 20
        ranked = [top.logprob for top in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert entry.logprob == ranked[0]
        assert entry.bytes is not None
    raw = b"".join(bytes(entry.bytes or ()) for entry in content)
    assert str(choice.message.content) in raw.decode()


@pytest.mark.repeatable
def test_token_ids_as_vllm_reports_them(client: OpenAI) -> None:
    """Whole and streamed; as the ids of a prompt they make the same completion."""
    extra = {"return_token_ids": True}
    whole = client.chat.completions.create(**CHAT, extra_body=extra).model_dump()
    prompt, ids = whole["prompt_token_ids"], whole["choices"][0]["token_ids"]
    assert len(prompt) == whole["usage"]["prompt_tokens"]
    assert len(ids) == whole["usage"]["completion_tokens"]
    chunks = [
        chunk.model_dump()
        for chunk in client.chat.completions.create(**CHAT, extra_body=extra, stream=True)
    ]
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == ids
    assert chunks[0]["prompt_token_ids"] == prompt
    fields = {"model": "tgi", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    again = client.completions.create(**fields, extra_body=extra).model_dump()["choices"][0]
    assert (again["prompt_token_ids"], again["token_ids"]) == (prompt, ids)


def test_every_plain_parameter(client: OpenAI) -> None:
    body = {
        "top_k": 30,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "min_tokens": 4,
        "ignore_eos": True,
        "stop_token_ids": [0],
        "chat_template_kwargs": {"unknown_to_the_template": True},
        "add_generation_prompt": True,
    }
    answer = client.chat.completions.create(
        model="tgi",
        messages=USER,  # type: ignore[arg-type]
        max_completion_tokens=6,
        temperature=0.8,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        logit_bias={"100": -100},
        stop=["xyzzy", "plugh"],
        seed=11,
        user="somebody",
        service_tier="auto",
        extra_body=body,
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


def test_a_stop_text_is_cut(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, stop="Paris")
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in str(answer.choices[0].message.content)


def test_a_begun_answer_is_continued(client: OpenAI) -> None:
    messages = [*USER, {"role": "assistant", "content": "The capital of France is"}]
    fields = {**CHAT, "messages": messages, "max_tokens": 4}
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    for extra in ({}, asked):
        answer = client.chat.completions.create(**fields, extra_body=extra)
        assert str(answer.choices[0].message.content).startswith(" Paris")
    fresh = client.chat.completions.create(**fields, extra_body={"continue_final_message": False})
    assert not str(fresh.choices[0].message.content).startswith(" Paris")


def test_typed_content_and_all_roles(client: OpenAI) -> None:
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": " of France?"},
    ]
    messages = [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, how can I help?"},
        {"role": "user", "content": parts},
    ]
    answer = client.chat.completions.create(**{**CHAT, "messages": messages})
    assert answer.choices[0].message.content


@pytest.mark.repeatable
@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_taken_and_streamed_whole(client: OpenAI, text: str) -> None:
    fields = {**CHAT, "messages": [{"role": "user", "content": text}], "max_tokens": 6}
    whole = client.chat.completions.create(**fields).choices[0].message.content
    stream = client.chat.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


async def test_asynchronous(patient: AsyncOpenAI) -> None:
    answer = await patient.chat.completions.create(**CHAT)
    text = answer.choices[0].message.content
    assert "Paris" in str(text)
    stream = await patient.chat.completions.create(**CHAT, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert len(pieces) > 3
    assert "".join(pieces) == text


async def test_a_client_that_leaves_makes_room(patient: AsyncOpenAI) -> None:
    fields = {**CHAT, "max_tokens": 900}
    stream = await patient.chat.completions.create(
        **fields, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    answer = await patient.chat.completions.create(**CHAT)
    assert "Paris" in str(answer.choices[0].message.content)
