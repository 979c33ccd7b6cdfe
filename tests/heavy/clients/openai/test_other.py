"""The openai package: completions, embeddings, models, and every class of error."""

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.heavy.clients.world import KEY, LIMIT, PATIENCE_S, TEMPLATED, TEXTS, USER
from tests.system.server import Server

pytestmark = pytest.mark.both_ways

COMPLETE: dict[str, Any] = {
    "model": "tgi",
    "prompt": TEMPLATED,
    "max_tokens": 24,
    "temperature": 0,
}
CHAT: dict[str, Any] = {"model": "tgi", "messages": USER, "max_tokens": 2}


@pytest.fixture
def lenient(server: Server) -> Iterator[OpenAI]:
    """Where the types of the package are wrong about OpenAI's own answers.

    They know no ``null`` as finish reason, which streams have, none as the first token's log
    probability, and no vectors in base64, which the package itself asks for.
    """
    with OpenAI(base_url=f"{server.rest}/v1", api_key=KEY, timeout=PATIENCE_S) as client:
        yield client


def test_a_completion_and_its_stream(client: OpenAI, lenient: OpenAI) -> None:
    whole = client.completions.create(**COMPLETE)
    assert whole.object == "text_completion"
    assert whole.choices[0].finish_reason == "stop"
    assert "Paris" in whole.choices[0].text
    options = {"include_usage": True}
    *chunks, last = lenient.completions.create(**COMPLETE, stream=True, stream_options=options)
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"


def test_echo_with_the_prompts_log_probabilities(lenient: OpenAI) -> None:
    answer = lenient.completions.create(
        model="tgi", prompt="One two three", max_tokens=3, temperature=0, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    assert choice.text.startswith("One two three")
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == choice.text
    first, *others = logprobs.token_logprobs
    assert first is None
    assert all(value <= 0 for value in others)
    offsets = [len("".join(logprobs.tokens[:index])) for index in range(len(logprobs.tokens))]
    assert logprobs.text_offset == offsets
    assert all(len(top) >= 2 for top in logprobs.top_logprobs[1:] if top)


def test_scoring_a_prompt_alone(lenient: OpenAI) -> None:
    """How evaluation harnesses ask for the likelihood of a text."""
    answer = lenient.completions.create(
        model="tgi", prompt="Paris is in France", max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    assert choice.text == "Paris is in France"
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == len(choice.logprobs.tokens or ()) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_lists_of_prompts_come_in_order(client: OpenAI) -> None:
    prompts = ["One two", "Once upon a", "The sun"]
    answer = client.completions.create(
        model="tgi", prompt=prompts, n=2, max_tokens=3, temperature=0, echo=True
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        assert choice.text.startswith(prompts[choice.index // 2])


def test_prompts_of_token_ids(client: OpenAI, server: Server) -> None:
    found = server.client.post("/tokenize", json={"inputs": TEMPLATED}).json()
    ids = [token["id"] for token in found]
    whole = client.completions.create(**COMPLETE).choices[0].text
    assert client.completions.create(**{**COMPLETE, "prompt": ids}).choices[0].text == whole
    both = client.completions.create(**{**COMPLETE, "prompt": [ids, ids]})
    assert [choice.text for choice in both.choices] == [whole, whole]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(client: OpenAI, text: str) -> None:
    answer = client.completions.create(
        model="tgi", prompt=text, max_tokens=2, temperature=0, echo=True
    )
    assert answer.choices[0].text.startswith(text)


def test_embeddings(lenient: OpenAI, server: Server) -> None:
    """The client asks for base64 unless it is told otherwise, and takes it apart itself."""
    texts = ["a cat", "a dog", "stock prices fell"]
    answer = lenient.embeddings.create(model=server.model, input=texts)
    assert [one.index for one in answer.data] == [0, 1, 2]
    vectors = [one.embedding for one in answer.data]
    assert all(math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-4) for vector in vectors)
    plain = lenient.embeddings.create(model=server.model, input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=1e-3)
    coded = lenient.embeddings.create(model=server.model, input="a cat", encoding_format="base64")
    raw = base64.b64decode(str(coded.data[0].embedding))
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(vectors[0], abs=1e-3)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3


def test_models(client: OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    model = client.models.retrieve(server.model)
    assert (model.id, model.object) == (server.model, "model")
    assert isinstance(model.created, int)


def test_bad_requests(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, temperature=-1)
    error = caught.value
    assert (error.type, error.param) == ("invalid_request_error", "temperature")
    assert error.code
    for fields in (
        {"messages": []},
        {"messages": [{"role": "user", "content": "word " * 2 * LIMIT}]},
        {"max_tokens": LIMIT + 1},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"top_logprobs": 5},
        {"n": 0},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**CHAT, **fields})
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**COMPLETE, suffix="x")
    assert caught.value.param == "suffix"


def test_a_bad_request_is_known_before_the_first_event(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**CHAT, temperature=-1, stream=True)


def test_a_schema_that_cannot_be_used_is_named(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "no such type"}}}
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, response_format=broken)
    assert str(caught.value.param).startswith("response_format")


def test_a_wrong_key_and_a_wrong_model(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        OpenAI(base_url=f"{server.rest}/v1", api_key="wrong").chat.completions.create(**CHAT)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**CHAT, "model": "no-such-model"})
    assert missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
    with pytest.raises(openai.NotFoundError):
        client.files.list()


def test_a_body_that_is_too_large(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{**COMPLETE, "prompt": "x" * 3_000_000})
    assert caught.value.status_code == 413


def test_nobody_there() -> None:
    away = OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.APIConnectionError):
        away.chat.completions.create(**CHAT)


async def test_asynchronous(patient: AsyncOpenAI, server: Server) -> None:
    whole = await patient.completions.create(**COMPLETE)
    assert "Paris" in whole.choices[0].text
    answer = await patient.embeddings.create(
        model=server.model, input="a cat", encoding_format="float"
    )
    assert len(answer.data) == 1
    assert [model.id async for model in patient.models.list()] == [server.model]
