import pytest

from router.errors import Fault, RequestError, TooLongError
from tests.service.fake_service import FakeService
from tests.service.rest_server import chat, client_of, complete


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"store": True}, "store"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": 5}}, "metadata.k"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"prediction": {"type": "guess", "content": "x"}}, "prediction.type"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
        ({"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages.0.audio"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal"}]}]},
            "messages.0.content.0.text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs"),
        ({"model": 5}, "model"),
    ],
)
async def test_bad_chat_fields_are_named(
    fields: dict[str, object], param: str, stream: bool
) -> None:
    service = FakeService()
    answer = await chat(service, **{"stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert service.asks == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"], "n": 129}, "n"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2**62}, "best_of"),
        ({"n": 2**62}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_bad_completion_fields_are_named(fields: dict[str, object], param: str) -> None:
    answer = await complete(FakeService(), **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == param


async def test_harmless_values_of_unsupported_fields_are_accepted() -> None:
    answer = await chat(
        FakeService(),
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        audio=None,
        store=False,
        reasoning_effort="none",
        verbosity="medium",
        prediction={"type": "content", "content": "x"},
        safety_identifier="x",
        prompt_cache_key="x",
        prompt_cache_options={"mode": "explicit"},
        prompt_cache_retention="24h",
        parallel_tool_calls=True,
        user="x",
        metadata={"k": "v"},
    )
    assert answer.status_code == 200
    assert answer.json()["metadata"] == {"k": "v"}
    assert "x-ignored-parameters" not in answer.headers
    assert (await complete(FakeService(), best_of=2, n=2, suffix=None)).status_code == 200


async def test_deeply_nested_template_variables_are_refused() -> None:
    deep: object = 1
    for _ in range(500):
        deep = [deep]
    for fields in (
        {"chat_template_kwargs": {"x": deep}},
        {"messages": [{"role": "user", "content": "x", "extra": deep}]},
    ):
        assert (await chat(FakeService(), **fields)).status_code == 400


@pytest.mark.parametrize(
    ("fault", "status", "kind", "code"),
    [
        (Fault.OVERLOADED, 429, "rate_limit_error", "rate_limit_exceeded"),
        (Fault.UNAVAILABLE, 503, "server_error", "unavailable"),
        (Fault.WORKER_LOST, 503, "server_error", "worker_lost"),
        (Fault.ENGINE_FAILED, 500, "server_error", "engine_failed"),
        (Fault.VALIDATION, 400, "invalid_request_error", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_byte_have_their_status(
    fault: Fault, status: int, kind: str, code: str, stream: bool
) -> None:
    error = RequestError(fault, "`inputs` and `max_new_tokens`", "seed")
    answer = await chat(FakeService([error]), stream=stream)
    assert answer.status_code == status
    assert answer.json() == {
        "error": {
            "message": "`prompt` and `max_tokens`",
            "type": kind,
            "param": "seed",
            "code": code,
        }
    }


async def test_malformed_json_is_openais_error() -> None:
    async with client_of(FakeService()) as client:
        answer = await client.post("/v1/chat/completions", content=b"{")
        assert answer.status_code == 400
        assert "JSON" in answer.json()["error"]["message"]


async def test_models_and_unknown_ones() -> None:
    async with client_of(FakeService()) as client:
        (entry,) = (await client.get("/v1/models")).json()["data"]
        assert (entry["id"], entry["object"], entry["owned_by"]) == ("m/one", "model", "m/one")
        assert (await client.get("/v1/models/m/one")).json() == entry
        missing = await client.get("/v1/models/nope")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
    answer = await chat(FakeService(), model="nope", stream=True)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    for name in ("tgi", "dummy", "", "http://host:3000/v1", None):
        assert (await chat(FakeService(), model=name)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_that_are_too_long_have_the_code_that_clients_shorten_them_on(
    stream: bool,
) -> None:
    for send, field in ((chat, "messages"), (complete, "prompt")):
        service = FakeService()
        service.refusal = TooLongError("`inputs` must have less than 9 tokens", "prompt")
        answer = await send(service, stream=stream)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["type"] == "invalid_request_error"
        assert (error["param"], error["message"]) == (
            field,
            f"`{field}` must have less than 9 tokens",
        )


async def test_every_answer_has_a_request_id() -> None:
    async with client_of(FakeService()) as client:
        answers = [
            await client.get("/v1/models"),
            await client.get("/nowhere"),
            await client.post("/v1/completions", json={"prompt": "x"}),
            await client.post("/v1/completions", json={"prompt": "x", "stream": True}),
            await client.post("/v1/completions", json={}),
        ]
        ids = {answer.headers["x-request-id"] for answer in answers}
        assert len(ids) == len(answers)
        for given, kept in (("trace-7", True), ("two words", False), ("x" * 129, False)):
            answer = await client.get("/v1/models", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) == kept


async def test_browsers_may_send_what_the_sdks_send() -> None:
    headers = {
        "origin": "https://example.org",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    async with client_of(FakeService()) as client:
        answer = await client.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 200
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
