"""langchain-openai: chats, streams, bound tools, structured output and embeddings."""

import json
from typing import Literal

import jsonschema
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from tests.heavy.clients.world import (
    KEY,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    QUESTION,
    TEMPLATED,
    TOOL_TOKENS,
)
from tests.system.server import Server

ASKED = "What is the weather in Paris?"


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    mood: Literal["glad", "sad"]


@tool
def weather(unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in Paris."""
    return f"21 {unit}"


@pytest.fixture
def chat(server: Server) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.rest}/v1",
        api_key=SecretStr(KEY),
        model=server.model,
        temperature=0,
        max_completion_tokens=24,
        timeout=PATIENCE_S,
        max_retries=0,
        stream_usage=True,
    )


def long(chat: ChatOpenAI, tokens: int) -> ChatOpenAI:
    """The same with room for more."""
    return chat.model_copy(update={"max_tokens": tokens})


@pytest.mark.repeatable
def test_invoke_and_stream(chat: ChatOpenAI) -> None:
    messages = [SystemMessage("You know all capitals."), HumanMessage(QUESTION)]
    whole = chat.invoke(messages)
    assert isinstance(whole, AIMessage)
    assert whole.content
    usage = whole.usage_metadata
    assert usage is not None
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    pieces = list(chat.stream(messages))
    assert len(pieces) > 3
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    streamed = total.usage_metadata
    assert streamed is not None
    assert streamed["total_tokens"] == usage["total_tokens"]


async def test_asynchronous(chat: ChatOpenAI) -> None:
    whole = await chat.ainvoke(QUESTION)
    assert "Paris" in str(whole.content)
    pieces = [str(piece.content) async for piece in chat.astream(QUESTION)]
    assert "".join(pieces) == whole.content
    both = await chat.abatch([QUESTION, QUESTION])
    assert [one.content for one in both] == [whole.content] * 2


@pytest.mark.parametrize("choice", ["any", "weather"])
def test_bound_tools_and_their_results(chat: ChatOpenAI, choice: str) -> None:
    # Strict: no arguments but those, which have an end. With others a call may have none.
    bound = long(chat, TOOL_TOKENS).bind_tools([weather], tool_choice=choice, strict=True)
    first = bound.invoke(ASKED)
    assert first.tool_calls
    assert not first.invalid_tool_calls
    results = [weather.invoke(call) for call in first.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    answer = chat.invoke([HumanMessage(ASKED), first, *results])
    assert answer.content
    gathered = None
    for piece in bound.stream(ASKED):
        gathered = piece if gathered is None else gathered + piece
    assert gathered is not None
    for call in (*first.tool_calls, *gathered.tool_calls):  # type: ignore[attr-defined]
        assert call["name"] == "weather"
        assert call["args"]["unit"] in ("celsius", "fahrenheit")
    assert gathered.tool_calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Literal["json_schema"]) -> None:
    roomy = long(chat, PERSON_TOKENS)
    found = roomy.with_structured_output(Person, method=method).invoke("Describe a person.")
    assert isinstance(found, Person)


def test_structured_output_by_a_schema(chat: ChatOpenAI) -> None:
    schema = {**PERSON, "title": "person", "description": "A person"}
    structured = long(chat, PERSON_TOKENS).with_structured_output(schema, method="json_schema")
    found = structured.invoke("Describe a person.")
    jsonschema.validate(json.loads(json.dumps(found)), PERSON)


def test_the_responses_route(chat: ChatOpenAI) -> None:
    other = chat.model_copy(update={"use_responses_api": True})
    assert "Paris" in str(other.invoke(QUESTION).content)
    text = "".join(piece.text for piece in other.stream(QUESTION))
    assert "Paris" in text


def test_completions(server: Server) -> None:
    model = OpenAI(
        base_url=f"{server.rest}/v1",
        api_key=SecretStr(KEY),
        model=server.model,
        temperature=0,
        max_tokens=24,
    )
    whole = model.invoke(TEMPLATED)
    assert "Paris" in whole
    assert "".join(model.stream(TEMPLATED)) == whole


@pytest.mark.parametrize("checked", [True, False])
def test_embeddings(server: Server, checked: bool) -> None:
    """With its own count of tokens it sends token ids, of a tokenizer that it would download."""
    model = OpenAIEmbeddings(
        base_url=f"{server.rest}/v1",
        api_key=SecretStr(KEY),
        model=server.model,
        check_embedding_ctx_length=False,
        model_kwargs={} if checked else {"encoding_format": "float"},
    )
    cat, dog = model.embed_documents(["a cat", "a dog"])
    assert len(cat) == len(dog) > 10
    assert model.embed_query("a cat") == pytest.approx(cat, abs=1e-3)
    # More than a worker takes in one call; LangChain sends up to 1000 in a request.
    many = model.embed_documents(["a cat"] * 300)
    assert len(many) == 300
    assert many[-1] == pytest.approx(cat, abs=1e-3)
