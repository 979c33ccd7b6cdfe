"""huggingface_hub's InferenceClient, aimed at an endpoint of one's own."""

import json
import re
from typing import Any

import jsonschema
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, UnknownError, ValidationError

from tests.heavy.clients.world import (
    KEY,
    LIMIT,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    SCHEMAS,
    TEMPLATED,
    TEXTS,
    TOOL_TOKENS,
    TOOLS,
    USER,
)
from tests.system.server import Server

ASK: dict[str, Any] = {"messages": USER, "max_tokens": 24, "temperature": 0}
CALL = {**ASK, "tools": TOOLS, "max_tokens": TOOL_TOKENS}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
# A stream shows the tokens as they are, and so the one that ends it.
EOS = "<|im_end|>"
GRAMMAR = {"type": "json", "value": PERSON}
REGEX = {"type": "regex", "value": r"\d{3}-[a-c]{4}"}


@pytest.fixture
def client(server: Server) -> InferenceClient:
    return InferenceClient(base_url=server.rest, api_key=KEY, timeout=PATIENCE_S)


@pytest.fixture
def native(server: Server) -> InferenceClient:
    """The endpoint's own URL as the model, which is how text generation is asked of it."""
    return InferenceClient(server.rest, token=KEY, timeout=PATIENCE_S)


@pytest.mark.both_ways
def test_text_generation(native: InferenceClient) -> None:
    answer = native.text_generation(TEMPLATED, max_new_tokens=24, return_full_text=False)
    assert "Paris" in answer
    pieces = list(native.text_generation(TEMPLATED, max_new_tokens=24, stream=True))
    assert len(pieces) > 3
    assert "".join(pieces) == answer + EOS


@pytest.mark.both_ways
def test_text_generation_in_detail(native: InferenceClient) -> None:
    answer = native.text_generation(TEMPLATED, max_new_tokens=24, details=True)
    assert answer.details is not None
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens)
    events = list(native.text_generation(TEMPLATED, max_new_tokens=24, details=True, stream=True))
    assert [event.token.id for event in events] == [token.id for token in answer.details.tokens]
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert events[-1].generated_text == answer.generated_text
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "eos_token"
    assert events[-1].details.generated_tokens == len(events)
    assert events[-1].details.input_length > 5


@pytest.mark.both_ways
def test_every_parameter_at_once(native: InferenceClient) -> None:
    wanted: dict[str, Any] = {
        "details": True,
        "do_sample": True,
        "frequency_penalty": 0.1,
        "max_new_tokens": 5,
        "repetition_penalty": 1.1,
        "return_full_text": True,
        "seed": 3,
        "stop": ["xyzzy"],
        "temperature": 0.7,
        "top_k": 20,
        "top_n_tokens": 2,
        "top_p": 0.9,
        "truncate": 50,
        "typical_p": 0.9,
        "decoder_input_details": True,
    }
    answer = native.text_generation("Once upon a time", **wanted)
    assert answer.generated_text.startswith("Once upon a time")
    assert answer.details.seed == 3
    assert len(answer.details.prefill) > 2
    assert [len(top) for top in answer.details.top_tokens] == [2] * 5
    best = native.text_generation("Once", do_sample=True, best_of=2, max_new_tokens=4, details=True)
    assert best.details is not None
    assert len(best.details.best_of_sequences or ()) == 1


@pytest.mark.both_ways
def test_grammars(native: InferenceClient) -> None:
    fields: dict[str, Any] = {"max_new_tokens": PERSON_TOKENS}
    fields["return_full_text"] = False
    text = native.text_generation("A person:", grammar=GRAMMAR, **fields)  # type: ignore[arg-type]
    jsonschema.validate(json.loads(text), PERSON)
    pieces = native.text_generation("A person:", grammar=GRAMMAR, stream=True, **fields)  # type: ignore[call-overload]
    jsonschema.validate(json.loads("".join(pieces).removesuffix(EOS)), PERSON)
    code = native.text_generation("A code:", grammar=REGEX, **fields)  # type: ignore[arg-type]
    assert re.fullmatch(REGEX["value"], code)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(native: InferenceClient, text: str) -> None:
    assert native.text_generation(text, max_new_tokens=2, return_full_text=True).startswith(text)


@pytest.mark.both_ways
def test_chat(client: InferenceClient) -> None:
    answer = client.chat_completion(**ASK)
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    chunks = list(
        client.chat_completion(**ASK, stream=True, stream_options={"include_usage": True})  # type: ignore[arg-type]
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == usage.total_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content


def test_a_begun_answer_is_continued(client: InferenceClient) -> None:
    messages = [*USER, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.chat_completion(**{**ASK, "messages": messages, "max_tokens": 4})
    assert str(answer.choices[0].message.content).startswith(" Paris")


def test_the_openai_way_of_calling_it(client: InferenceClient) -> None:
    answer = client.chat.completions.create(model="tgi", **ASK, logprobs=True, top_logprobs=2)
    assert "Paris" in str(answer.choices[0].message.content)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_tools(client: InferenceClient) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("required", named):
        answer = client.chat_completion(**CALL, tool_choice=choice)  # type: ignore[arg-type]
        calls = answer.choices[0].message.tool_calls
        assert calls
        for call in calls:
            arguments = call.function.arguments
            assert isinstance(arguments, str)
            jsonschema.validate(json.loads(arguments), SCHEMAS[call.function.name])
    pieces = ""
    for chunk in client.chat_completion(**CALL, tool_choice=named, stream=True):  # type: ignore[arg-type]
        for delta in chunk.choices[0].delta.tool_calls or ():
            pieces += delta.function.arguments or ""
    jsonschema.validate(json.loads(pieces), SCHEMAS["add"])


def test_a_schema_for_the_answer(client: InferenceClient) -> None:
    fields = {**ASK, "max_tokens": PERSON_TOKENS}
    answer = client.chat_completion(**fields, response_format=FORMAT)  # type: ignore[arg-type]
    jsonschema.validate(json.loads(str(answer.choices[0].message.content)), PERSON)


@pytest.mark.both_ways
def test_errors(native: InferenceClient, server: Server) -> None:
    with pytest.raises(ValidationError, match="Input validation error: "):
        native.text_generation("x", max_new_tokens=LIMIT + 1)
    with pytest.raises(ValidationError, match="Input validation error: "):
        list(native.text_generation("x", max_new_tokens=LIMIT + 1, stream=True))
    with pytest.raises(UnknownError, match="key"):
        InferenceClient(server.rest, token="wrong").text_generation("x")
    with pytest.raises(HfHubHTTPError) as bad:
        InferenceClient(base_url=server.rest, api_key=KEY).chat_completion(**ASK, top_p=-1.0)
    assert bad.value.response.status_code == 400


async def test_asynchronous(server: Server) -> None:
    async with AsyncInferenceClient(server.rest, token=KEY, timeout=PATIENCE_S) as client:
        answer = await client.text_generation(TEMPLATED, max_new_tokens=24, return_full_text=False)
        stream = await client.text_generation(TEMPLATED, max_new_tokens=24, stream=True)
        assert "".join([piece async for piece in stream]) == answer + EOS
        assert "Paris" in answer
    async with AsyncInferenceClient(base_url=server.rest, api_key=KEY) as client:
        said = await client.chat_completion(**ASK)
        chunks = await client.chat_completion(**ASK, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        assert text == said.choices[0].message.content
        forced = await client.chat_completion(**CALL, tool_choice="required")
        assert forced.choices[0].message.tool_calls
