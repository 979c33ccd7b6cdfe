"""TGI's own client, text-generation 0.7, as its users call it.

Its streaming of chats is left out: it cannot read the streams of TGI 3 either, as it takes the
closing ``[DONE]`` for JSON.
"""

import json
import re
from collections.abc import Sequence

import jsonschema
import pytest
from text_generation import AsyncClient, Client
from text_generation.errors import NotFoundError, UnknownError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType, Message, Token, Tool

from tests.heavy.clients.world import (
    KEY,
    LIMIT,
    PATIENCE_S,
    PERSON,
    PERSON_TOKENS,
    QUESTION,
    SCHEMAS,
    TEMPLATED,
    TEXTS,
    TOOL_TOKENS,
    TOOLS,
)
from tests.system.server import Server

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.rest, headers=HEADERS, timeout=PATIENCE_S)


@pytest.fixture
def patient(server: Server) -> AsyncClient:
    return AsyncClient(server.rest, headers=HEADERS, timeout=PATIENCE_S)


def like(tokens: Sequence[Token], others: Sequence[Token]) -> bool:
    """Whether two answers say the same; log probabilities agree up to rounding."""
    plain = [[(token.id, token.text, token.special) for token in one] for one in (tokens, others)]
    probable = [[token.logprob for token in one] for one in (tokens, others)]
    return plain[0] == plain[1] and probable[0] == pytest.approx(probable[1], abs=0.2)


@pytest.mark.both_ways
def test_generate(client: Client) -> None:
    answer = client.generate(TEMPLATED, max_new_tokens=24)
    details = answer.details
    assert "Paris" in answer.generated_text
    assert details.finish_reason is FinishReason.EndOfSequenceToken
    assert details.generated_tokens == len(details.tokens) <= 24
    assert details.seed is None
    shown = [token.text for token in details.tokens if not token.special]
    assert "".join(shown) == answer.generated_text
    assert all(token.logprob is not None and token.logprob <= 0 for token in details.tokens)
    assert details.prefill == []
    assert details.best_of_sequences is None


@pytest.mark.both_ways
def test_generate_stream_says_the_same(client: Client) -> None:
    whole = client.generate(TEMPLATED, max_new_tokens=24)
    events = list(client.generate_stream(TEMPLATED, max_new_tokens=24))
    assert like([event.token for event in events], whole.details.tokens)
    *before, last = events
    assert all(event.generated_text is None and event.details is None for event in before)
    assert last.generated_text == whole.generated_text
    assert last.details is not None
    assert last.details.finish_reason is FinishReason.EndOfSequenceToken
    assert last.details.generated_tokens == len(events)


@pytest.mark.repeatable
@pytest.mark.both_ways
def test_every_parameter_at_once(client: Client) -> None:
    wanted = {
        "do_sample": True,
        "max_new_tokens": 6,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "return_full_text": True,
        "seed": 7,
        "stop_sequences": ["xyzzy"],
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.95,
        "truncate": 100,
        "typical_p": 0.95,
        "top_n_tokens": 3,
    }
    first = client.generate("Once upon a time", **wanted)
    assert first.generated_text.startswith("Once upon a time")
    assert first.details.seed == 7
    assert first.details.finish_reason is FinishReason.Length
    assert first.details.top_tokens is not None
    assert [len(top) for top in first.details.top_tokens] == [3] * 6
    again = client.generate("Once upon a time", **wanted)
    assert again.generated_text == first.generated_text
    *_, last = client.generate_stream("Once upon a time", **wanted)
    assert last.generated_text == first.generated_text


@pytest.mark.both_ways
def test_prefill(client: Client) -> None:
    answer = client.generate("One two three", max_new_tokens=2, decoder_input_details=True)
    prefill = answer.details.prefill
    assert "".join(token.text for token in prefill) == "One two three"
    assert [token.logprob is None for token in prefill] == [True] + [False] * (len(prefill) - 1)


@pytest.mark.both_ways
def test_best_of(client: Client) -> None:
    answer = client.generate("Once", do_sample=True, best_of=3, max_new_tokens=8)
    others = answer.details.best_of_sequences
    assert others is not None
    assert len(others) == 2
    sequences = [answer.details, *others]
    means = [
        sum(token.logprob or 0.0 for token in one.tokens) / len(one.tokens) for one in sequences
    ]
    assert max(means) == means[0]
    assert len({one.seed for one in sequences}) == 3


def test_stop_sequences_stay_in_the_text(client: Client) -> None:
    answer = client.generate(TEMPLATED, max_new_tokens=24, stop_sequences=["Paris"])
    assert answer.generated_text.endswith("Paris")
    assert answer.details.finish_reason is FinishReason.StopSequence


@pytest.mark.both_ways
def test_json_grammar(client: Client) -> None:
    grammar = Grammar(type=GrammarType.Json, value=PERSON)
    answer = client.generate("A person:", max_new_tokens=PERSON_TOKENS, grammar=grammar)
    jsonschema.validate(json.loads(answer.generated_text), PERSON)
    streamed = client.generate_stream("A person:", max_new_tokens=PERSON_TOKENS, grammar=grammar)
    *_, last = streamed
    jsonschema.validate(json.loads(str(last.generated_text)), PERSON)


def test_regex_grammar(client: Client) -> None:
    pattern = r"\d{3}-[a-c]{4}"
    grammar = Grammar(type=GrammarType.Regex, value=pattern)
    answer = client.generate("A code:", max_new_tokens=20, grammar=grammar)
    assert re.fullmatch(pattern, answer.generated_text)
    sampled = client.generate(
        "A code:", max_new_tokens=20, grammar=grammar, do_sample=True, temperature=2.0, seed=5
    )
    assert re.fullmatch(pattern, sampled.generated_text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_whole(client: Client, text: str) -> None:
    answer = client.generate(text, max_new_tokens=4, return_full_text=True)
    assert answer.generated_text.startswith(text)


@pytest.mark.both_ways
def test_refusals_are_validation_errors(client: Client) -> None:
    with pytest.raises(ValidationError, match="Input validation error: "):
        client.generate("x", max_new_tokens=LIMIT + 1)
    with pytest.raises(ValidationError, match="best_of"):
        client.generate("x", do_sample=True, best_of=99)
    with pytest.raises(ValidationError, match="inputs"):
        client.generate("word " * 2 * LIMIT)
    broken = Grammar(type=GrammarType.Json, value={"type": "no such type"})
    with pytest.raises(ValidationError, match="grammar"):
        client.generate("x", grammar=broken)
    with pytest.raises(ValidationError, match="Input validation error: "):
        list(client.generate_stream("x", max_new_tokens=LIMIT + 1))


@pytest.mark.both_ways
def test_a_missing_key_and_a_missing_path_have_their_errors(server: Server) -> None:
    with pytest.raises(UnknownError, match="key"):
        Client(server.rest, timeout=PATIENCE_S).generate("x")
    lost = Client(f"{server.rest}/nowhere", headers=HEADERS, timeout=PATIENCE_S)
    with pytest.raises((NotFoundError, ValidationError), match="nowhere"):
        lost.generate("x")


def test_chat(client: Client) -> None:
    answer = client.chat([Message(role="user", content=QUESTION)], max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in str(choice.message.content)
    usage = answer.usage
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


def test_chat_goes_on_with_what_the_assistant_began(client: Client) -> None:
    begun = Message(role="assistant", content="The capital of France is")
    messages = [Message(role="user", content=QUESTION), begun]
    answer = client.chat(messages, max_tokens=4, temperature=0)
    assert str(answer.choices[0].message.content).startswith(" Paris")


@pytest.mark.parametrize("choice", ["required", "add"])
def test_chat_with_tools(client: Client, choice: str) -> None:
    """TGI takes the bare name of a function, too."""
    answer = client.chat(
        [Message(role="user", content="What is 2 and 3?")],
        max_tokens=TOOL_TOKENS,
        temperature=0,
        tools=[Tool(**tool) for tool in TOOLS],
        tool_choice=choice,
    )
    calls = answer.choices[0].message.tool_calls
    for call in calls:
        name = call["function"]["name"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
    assert calls
    if choice == "add":
        assert {call["function"]["name"] for call in calls} == {"add"}


@pytest.mark.both_ways
async def test_asynchronous(patient: AsyncClient) -> None:
    whole = await patient.generate(TEMPLATED, max_new_tokens=24)
    assert "Paris" in whole.generated_text
    events = [event async for event in patient.generate_stream(TEMPLATED, max_new_tokens=24)]
    assert like([event.token for event in events], whole.details.tokens)
    assert events[-1].generated_text == whole.generated_text
    messages = [Message(role="user", content=QUESTION)]
    answer = await patient.chat(messages, max_tokens=24, temperature=0)
    assert "Paris" in str(answer.choices[0].message.content)
    with pytest.raises(ValidationError, match="Input validation error: "):
        await patient.generate("x", max_new_tokens=LIMIT + 1)
    with pytest.raises(ValidationError, match="Input validation error: "):
        [event async for event in patient.generate_stream("x", max_new_tokens=LIMIT + 1)]
