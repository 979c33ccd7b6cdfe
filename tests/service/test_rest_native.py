"""TGI's `grammar`, `decoder_input_details` and model names, and the routes of hosts."""

import json
from typing import Any

import httpx
import pytest

from router.ask import Chunk, Constraint, ConstraintKind, Finish, TokenOut
from router.core.events import Reason
from tests.service.fake_service import FakeService, events_of, words
from tests.service.rest_server import USER, post

TEXT = "Once upon a tîme 🙂"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON, REGEX, LARK = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.LARK


async def generate(service: FakeService, path: str = "/generate", **given: Any) -> httpx.Response:
    return await post(service, path, {"inputs": "x", "parameters": given})


async def constraint(grammar: object) -> Constraint:
    service = FakeService()
    answer = await generate(service, grammar=grammar)
    assert answer.status_code == 200, answer.text
    found = service.asks[0].params.constraint
    assert found is not None
    assert found.field == "grammar"
    return found


@pytest.mark.parametrize(
    ("grammar", "schema"),
    [
        ({"type": "json", "value": SCHEMA}, SCHEMA),
        ({"type": "json", "value": json.dumps(SCHEMA)}, SCHEMA),
        ({"type": "json_object", "value": SCHEMA}, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "value": None}, {"type": "object"}),
        ({"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_schema", "value": {"schema": SCHEMA, "strict": True}}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, SCHEMA),
        # TGI needs `properties` at the top.
        ({"type": "json", "value": {"type": "array"}}, {"type": "array"}),
        ({"type": "json", "value": {"anyOf": [SCHEMA]}}, {"anyOf": [SCHEMA]}),
        ({"type": "json", "value": {"$ref": "#/$defs/a", "$defs": {"a": SCHEMA}}}, None),
        ({"type": "json", "value": {}}, {}),
    ],
)
async def test_schemas(grammar: dict[str, Any], schema: object) -> None:
    found = await constraint(grammar)
    assert found.kind is JSON
    assert json.loads(found.text) == (grammar["value"] if schema is None else schema)


async def test_other_grammars() -> None:
    assert await constraint({"type": "regex", "value": "a+"}) == Constraint(REGEX, "a+", "grammar")
    found = await constraint({"type": "choice", "value": ["yes", "no"]})
    assert found.kind is LARK
    assert '"yes"' in found.text
    found = await constraint({"type": "grammar", "value": 'start: "a"'})
    assert found == Constraint(LARK, 'start: "a"', "grammar")
    service = FakeService()
    await generate(service, grammar=None)
    assert service.asks[0].params.constraint is None


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json"},
        {"type": "json", "value": "{"},
        {"type": "json", "value": [1]},
        {"type": "json", "value": 7},
        {"type": "json_schema", "value": SCHEMA},
        {"type": "json_schema"},
        {"type": "regex", "value": {}},
        {"type": "regex", "value": ""},
        {"type": "choice", "value": "yes"},
        {"type": "choice", "value": []},
        {"type": "choice", "value": [1]},
        {"type": "grammar", "value": 7},
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_grammar_that_is_none_is_refused(path: str, grammar: object) -> None:
    service = FakeService()
    answer = await generate(service, path, grammar=grammar)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert "grammar" in answer.json()["error"]
    assert service.asks == []


async def test_the_prompts_tokens() -> None:
    prompt = (TokenOut(1, "<s>", True), TokenOut(2, "x", False, -0.25))
    finish = Finish(Reason.EOS, "y", 2, 1, prompt=prompt)
    out = TokenOut(3, "y", False, -0.5)
    service = FakeService([Chunk((out,), "y", finish)])
    answer = await generate(service, decoder_input_details=True)  # TGI: it asks for details, too
    assert answer.json()["details"]["prefill"] == [
        {"id": 1, "text": "<s>", "logprob": None},
        {"id": 2, "text": "x", "logprob": -0.25},
    ]
    params = service.asks[0].params
    assert params.prompt_logprobs
    assert params.logprobs
    service = FakeService()
    await generate(service, details=True)
    assert not service.asks[0].params.prompt_logprobs
    answer = await generate(service, "/generate_stream", decoder_input_details=True)
    assert answer.status_code == 422
    assert "is not supported when streaming tokens" in answer.json()["error"]


async def test_top_tokens_say_which_are_special(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(words((" a",), tops=2))
    from tests.service.fake_service import byte_tokenizer

    monkeypatch.setattr(type(byte_tokenizer()), "is_special", lambda _, token: token == 91)
    answer = await generate(service, details=True, top_n_tokens=2)
    (tops,) = answer.json()["details"]["top_tokens"]
    assert [top["special"] for top in tops] == [False, True]
    answer = await generate(service, "/generate_stream", top_n_tokens=2)
    assert [top["special"] for top in events_of(answer.text)[0]["top_tokens"]] == [False, True]


@pytest.mark.parametrize("name", ["tgi", "dummy", "https://x.example/", "", "m/one", None])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/tokenize"])
async def test_names_that_mean_the_default_model(path: str, name: str | None) -> None:
    answer = await post(FakeService(), path, {"inputs": "x", "model": name})
    assert answer.status_code == 200
    assert "x-ignored-parameters" not in answer.headers


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/tokenize"])
async def test_an_unknown_model_is_an_error(path: str) -> None:
    answer = await post(FakeService(), path, {"inputs": "x", "model": "gpt-9"})
    assert answer.status_code == 404
    assert answer.json()["error_type"] == "model_not_found"


async def test_best_of_samples_whatever_temperature_is_given() -> None:
    service = FakeService()
    assert (await generate(service, best_of=2, temperature=1.0)).status_code == 200
    assert [ask.params.temperature for ask in service.asks] == [1.0, 1.0]
    body = {"inputs": "x", "parameters": {"best_of": 2, "temperature": 1.0}}
    answer = await post(service, "/generate", body, max_best_of=1)
    assert "`best_of` != 1 is not allowed for this endpoint" in answer.json()["error"]


# --- /invocations


async def test_invocations_tell_three_bodies_apart() -> None:
    native = await post(FakeService(), "/invocations", {"inputs": "Hi: ", "messages": 7})
    assert native.json() == [{"generated_text": "Hi: " + TEXT}]
    streamed = await post(FakeService(), "/invocations", {"inputs": "x", "stream": True})
    assert events_of(streamed.text)[-1]["generated_text"] == "x" + TEXT
    chat = await post(FakeService(), "/invocations", {"messages": USER, "prompt": "x"})
    assert chat.json()["object"] == "chat.completion"
    assert chat.json()["choices"][0]["message"]["content"] == TEXT
    completion = await post(FakeService(), "/invocations", {"prompt": "x"})
    assert completion.json()["choices"][0]["text"] == TEXT
    streamed = await post(FakeService(), "/invocations", {"prompt": "x", "stream": True})
    assert events_of(streamed.text)[-1] == "[DONE]"


@pytest.mark.parametrize("body", [{}, {"text": "x"}, [], "inputs", 0])
async def test_invocations_need_one_of_their_fields(body: object) -> None:
    answer = await post(FakeService(), "/invocations", body)
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert "inputs, messages, prompt" in answer.json()["error"]


async def test_invocations_are_bounded() -> None:
    answer = await post(FakeService(), "/invocations", {"inputs": "x" * 100}, payload_limit=50)
    assert answer.status_code == 413


# --- /vertex


async def test_vertex_answers_in_order_and_honours_every_parameter() -> None:
    service = FakeService(words(("a",)), words(("b",)), words(("c",)))
    parameters = {"max_new_tokens": 3, "top_k": 4, "seed": 5, "stop": ["x"]}
    instances = [
        {"inputs": "one", "parameters": parameters},
        {"inputs": "two", "parameters": {"do_sample": False, "return_full_text": True}},
        {"inputs": "three"},
    ]
    answer = await post(service, "/vertex", {"instances": instances})
    assert answer.json() == {"predictions": ["a", "twob", "c"]}
    one, two, three = (ask.params for ask in service.asks)
    assert (one.max_tokens, one.top_k, one.seed, one.stop) == (3, 4, 5, ("x",))
    assert [params.temperature for params in (one, two, three)] == [1.0, 0.0, 1.0]


async def test_vertex_names_what_it_ignores() -> None:
    instances = [
        {"inputs": "x", "parameters": {"zeta": 1, "top_k": 4}},
        {"messages": USER, "max_tokens": 4, "eta": 2},
    ]
    answer = await post(FakeService(), "/vertex", {"instances": instances, "theta": 3})
    named = "instances.0.parameters.zeta,instances.1.eta,theta"
    assert answer.headers["x-ignored-parameters"] == named


async def test_vertex_takes_conversations_and_the_best_of_several() -> None:
    service = FakeService(words(("bad",), mean=-2.0), words(("good",), mean=-1.0))
    instances = [{"inputs": "x", "parameters": {"best_of": 2}}]
    answer = await post(service, "/vertex", {"instances": instances})
    assert answer.json() == {"predictions": ["good"]}
    service = FakeService()
    answer = await post(service, "/vertex", {"instances": [{"messages": USER, "max_tokens": 4}]})
    assert answer.json() == {"predictions": [TEXT]}
    assert service.asks[0].params.max_tokens == 4
    assert "Hi" in str(service.messages)


@pytest.mark.parametrize(
    ("instances", "told"),
    [
        ([], "`instances` must have 1 to 128 entries. Given: 0"),
        ([{}] * 129, "Given: 129"),
        ([{"inputs": "x"}, {"inputs": ""}], "instances.1: `inputs` cannot be empty"),
        ([{"inputs": "x"}, {"parameters": {}}], "instances.1: `messages`"),
        ([{"inputs": "x", "parameters": {"top_k": 0}}], "instances.0: `top_k`"),
        ([{"messages": USER, "stream": True}], "instances.0: `stream`"),
        ([{"messages": USER, "n": 2}], "instances.0: `n`"),
        ("x", "`instances`"),
    ],
)
async def test_vertex_refuses_before_anything_runs(instances: object, told: str) -> None:
    service = FakeService()
    answer = await post(service, "/vertex", {"instances": instances})
    assert answer.status_code == 422
    assert told in answer.json()["error"]
    assert service.asks == []
