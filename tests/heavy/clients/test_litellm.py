"""litellm: as OpenAI's, as Hugging Face's and as Anthropic's provider, without a word to others."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import litellm
import pytest

from tests.heavy.clients.world import (
    KEY,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    SCHEMAS,
    TEMPLATED,
    TOOL_TOKENS,
    TOOLS,
    USER,
)
from tests.system.server import Server

# No more arguments than those, and so an end of each call, also for the provider that takes
# ``additionalProperties`` out of all schemas.
COUNTED = {name: {**schema, "maxProperties": 2} for name, schema in SCHEMAS.items()}
BOUNDED = [
    {**tool, "function": {**tool["function"], "parameters": COUNTED[tool["function"]["name"]]}}
    for tool in TOOLS
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.fixture(params=["openai", "huggingface", "hosted_vllm", "anthropic"])
def common(request: pytest.FixtureRequest, server: Server, asked: list[str]) -> Iterator[Any]:
    """What each provider of litellm needs to find the server.

    Hugging Face's looks for the size of the model on the hub, whatever the server: in vain here.
    """
    base = server.rest if request.param in ("huggingface", "anthropic") else f"{server.rest}/v1"
    yield {
        "model": f"{request.param}/tgi",
        "api_base": base,
        "api_key": KEY,
        "timeout": PATIENCE_S,
        "temperature": 0,
        "num_retries": 0,
    }
    if request.param == "huggingface":
        asked[:] = [host for host in asked if host != "huggingface.co"]


def test_an_answer_and_its_stream(common: dict[str, Any]) -> None:
    answer = litellm.completion(**common, messages=USER, max_tokens=24)
    text = answer.choices[0].message.content
    assert "Paris" in text
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens
    stream = litellm.completion(**common, messages=USER, max_tokens=24, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 3
    assert "".join(pieces) == text


def test_forced_tools(common: dict[str, Any]) -> None:
    fields = {**common, "tools": BOUNDED, "tool_choice": "required", "max_tokens": TOOL_TOKENS}
    whole = litellm.completion(**fields, messages=USER)
    chunks = list(litellm.completion(**fields, messages=USER, stream=True))
    for answer in (whole, litellm.stream_chunk_builder(chunks)):
        calls = answer.choices[0].message.tool_calls
        assert calls
        for call in calls:
            schema = COUNTED[call.function.name]
            jsonschema.validate(json.loads(call.function.arguments), schema)


def test_a_schema_for_the_answer(server: Server) -> None:
    answer = litellm.completion(
        model="openai/tgi",
        api_base=f"{server.rest}/v1",
        api_key=KEY,
        messages=USER,
        temperature=0,
        max_tokens=PERSON_TOKENS,
        response_format=FORMAT,
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)


def test_completions_and_embeddings(server: Server) -> None:
    common: dict[str, Any] = {"api_base": f"{server.rest}/v1", "api_key": KEY}
    answer = litellm.text_completion(
        model="text-completion-openai/tgi", prompt=TEMPLATED, max_tokens=24, temperature=0, **common
    )
    assert "Paris" in answer.choices[0].text
    found = litellm.embedding(model=f"openai/{server.model}", input=["a cat", "a dog"], **common)
    assert len(found.data) == 2


async def test_asynchronous(common: dict[str, Any]) -> None:
    answer = await litellm.acompletion(**common, messages=USER, max_tokens=24)
    assert "Paris" in answer.choices[0].message.content
    stream = await litellm.acompletion(**common, messages=USER, max_tokens=24, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == answer.choices[0].message.content


def test_errors_keep_their_class(server: Server) -> None:
    common: dict[str, Any] = {
        "api_base": f"{server.rest}/v1",
        "messages": USER,
        "num_retries": 0,
        "max_tokens": 1,
    }
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model="openai/tgi", api_key="wrong", **common)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/tgi", api_key=KEY, temperature=-1, **common)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/no-such-model", api_key=KEY, **common)
