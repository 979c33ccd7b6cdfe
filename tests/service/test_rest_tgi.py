import pytest

from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason
from router.errors import Fault, RequestError
from tests.service.fake_service import FakeService, events_of, words
from tests.service.rest_server import client_of, post

TEXT = "Once upon a tîme 🙂"


async def test_generate_returns_the_text_and_tgis_headers() -> None:
    answer = await post(FakeService(), "/generate", {"inputs": "hä"})
    assert answer.status_code == 200
    assert answer.json() == {"generated_text": TEXT}
    assert answer.headers["x-compute-type"] == "1-cpu"
    assert answer.headers["x-prompt-tokens"] == "7"
    assert answer.headers["x-generated-tokens"] == "5"
    assert answer.headers["x-compute-characters"] == "2"
    for name in ("total", "validation", "queue", "inference"):
        assert int(answer.headers[f"x-{name}-time"]) >= 0
    assert int(answer.headers["x-time-per-token"]) >= 0
    assert float(answer.headers["x-compute-time"]) > 0


async def test_the_wait_for_a_place_is_no_time_of_the_model() -> None:
    outs = (TokenOut(1, "a"), TokenOut(2, "b"))
    waited = Finish(Reason.EOS, "ab", 1, 2, queued_ms=600_000)
    answer = await post(FakeService([Chunk(outs, "ab", waited)]), "/generate", {"inputs": "x"})
    assert answer.headers["x-queue-time"] == "600000"
    assert answer.headers["x-inference-time"] == answer.headers["x-time-per-token"] == "0"


async def test_details_have_tgis_shape() -> None:
    service = FakeService(words((" a", " b"), Reason.EOS, seed=9, tops=2))
    parameters = {"details": True, "top_n_tokens": 2, "do_sample": True}
    answer = await post(service, "/generate", {"inputs": "x", "parameters": parameters})
    tops = [
        {"id": 90, "text": "t0", "logprob": -0.0, "special": False},
        {"id": 91, "text": "t1", "logprob": -1.0, "special": False},
    ]
    assert answer.json() == {
        "generated_text": " a b",
        "details": {
            "finish_reason": "eos_token",
            "generated_tokens": 2,
            "seed": 9,
            "prefill": [],
            "tokens": [
                {"id": 10, "text": " a", "logprob": -0.5, "special": False},
                {"id": 11, "text": " b", "logprob": -0.5, "special": False},
            ],
            "top_tokens": [tops, tops],
        },
    }
    assert service.asks[0].params.logprobs
    assert service.asks[0].params.top_logprobs == 2


async def test_stream_events_have_tgis_shape() -> None:
    service = FakeService(words((" a", " b"), Reason.STOP_STRING))
    body = {"inputs": "x", "parameters": {"details": True}}
    answer = await post(service, "/generate_stream", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-compute-type"] == "1-cpu"
    assert answer.headers["x-compute-characters"] == "1"
    assert events_of(answer.text) == [
        {
            "index": 1,
            "token": {"id": 10, "text": " a", "logprob": -0.5, "special": False},
            "generated_text": None,
            "details": None,
        },
        {
            "index": 2,
            "token": {"id": 11, "text": " b", "logprob": -0.5, "special": False},
            "generated_text": " a b",
            "details": {
                "finish_reason": "stop_sequence",
                "generated_tokens": 2,
                "seed": None,
                "input_length": 7,
            },
        },
    ]
    assert service.asks[0].params.logprobs


async def test_a_chunk_of_many_tokens_is_one_event_each_and_an_empty_end_is_an_event() -> None:
    outs = tuple(TokenOut(i, f"w{i}", logprob=-float("inf")) for i in range(3))
    finish = Finish(Reason.LENGTH, "w0w1w2", 1, 3)
    service = FakeService([Chunk(outs, "w0w1w2"), Chunk((), "", finish)])
    answer = await post(service, "/generate_stream", {"inputs": "x"})
    events = events_of(answer.text)
    assert [event["index"] for event in events] == [1, 2, 3, 4]
    assert [event["token"]["text"] for event in events] == ["w0", "w1", "w2", ""]
    assert events[0]["token"]["logprob"] is None
    assert [event["generated_text"] for event in events] == [None, None, None, "w0w1w2"]
    assert events[-1]["token"]["special"]


async def test_compat_route_wraps_and_returns_the_full_text() -> None:
    answer = await post(FakeService(), "/", {"inputs": "Hello: "})
    assert answer.json() == [{"generated_text": "Hello: " + TEXT}]
    body = {"inputs": "Hello: ", "stream": True, "parameters": {"return_full_text": False}}
    answer = await post(FakeService(), "/", body)
    assert events_of(answer.text)[-1]["generated_text"] == TEXT


async def test_parameters_become_the_routers() -> None:
    service = FakeService()
    parameters = {
        "temperature": 0.5,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "top_k": 3,
        "top_p": 0.9,
        "typical_p": 0.8,
        "max_new_tokens": 12,
        "stop": ["\n", "x"],
        "truncate": 5,
        "seed": 2**64 - 1,
    }
    await post(service, "/generate", {"inputs": "x", "parameters": parameters})
    (ask,) = service.asks
    params = ask.params
    assert (params.temperature, params.top_k, params.top_p, params.typical_p) == (0.5, 3, 0.9, 0.8)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.1, 0.1)
    assert (params.max_tokens, params.stop, params.seed) == (12, ("\n", "x"), 2**64 - 1)
    assert ask.truncate == 5
    assert params.include_stop
    assert not params.logprobs


@pytest.mark.parametrize(
    ("body", "temperature"),
    [
        ({}, 1.0),
        ({"parameters": {}}, 0.0),
        ({"parameters": None}, 1.0),
        ({"parameters": {"do_sample": True}}, 1.0),
        ({"parameters": {"temperature": 0.7}}, 0.7),
        ({"parameters": {"temperature": 1.0}}, 0.0),
        ({"parameters": {"top_k": 5}}, 1.0),
        ({"parameters": {"top_p": 1.0}}, 0.0),
        ({"parameters": {"top_p": 0.5}}, 1.0),
        ({"parameters": {"typical_p": 1.0}}, 0.0),
        ({"parameters": {"typical_p": 0.5}}, 1.0),
    ],
)
async def test_sampling_is_on_as_in_tgi(body: dict[str, object], temperature: float) -> None:
    service = FakeService()
    assert (await post(service, "/generate", {"inputs": "x", **body})).status_code == 200
    assert service.asks[0].params.temperature == temperature


async def test_best_of_returns_the_likeliest_and_lists_the_others() -> None:
    service = FakeService(words(("bad",), mean=-2.0, seed=1), words(("good",), mean=-1.0, seed=2))
    parameters = {"best_of": 2, "do_sample": True, "details": True}
    answer = await post(service, "/generate", {"inputs": "x", "parameters": parameters})
    body = answer.json()
    assert body["generated_text"] == "good"
    assert body["details"]["seed"] == 2
    assert [other["generated_text"] for other in body["details"]["best_of_sequences"]] == ["bad"]
    assert len(service.asks) == 2


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -5}, "max_new_tokens"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"max_new_tokens": 5.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": "a"}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"best_of": 0, "do_sample": True}, "best_of"),
        ({"best_of": 3, "do_sample": True}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"seed": -1}, "seed"),
        ({"top_n_tokens": 6}, "top_n_tokens"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"watermark": 1}, "watermark"),
        ({"grammar": "a"}, "grammar"),
        ({"grammar": {"type": "ebnf", "value": "a"}}, "grammar"),
        ({"grammar": {"value": "a"}}, "grammar"),
        ({"adapter_id": 7}, "adapter_id"),
        (7, "parameters"),
    ],
)
async def test_bad_parameters_are_named(path: str, parameters: object, name: str) -> None:
    service = FakeService()
    answer = await post(service, path, {"inputs": "x", "parameters": parameters})
    assert answer.status_code == 422
    body = answer.json()
    assert body["error_type"] == "validation"
    assert body["error"].startswith("Input validation error: ")
    assert name in body["error"]
    assert service.asks == []


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("fault", "status", "kind", "retry"),
    [
        (Fault.OVERLOADED, 429, "overloaded", True),
        (Fault.UNAVAILABLE, 503, "unavailable", True),
        (Fault.WORKER_LOST, 424, "generation", True),
        (Fault.TEMPLATE, 422, "template_error", False),
        (Fault.MODEL_NOT_FOUND, 404, "model_not_found", False),
    ],
)
@pytest.mark.parametrize("late", [False, True])
async def test_errors_before_the_first_byte_have_their_status(
    path: str, fault: Fault, status: int, kind: str, retry: bool, late: bool
) -> None:
    error = RequestError(fault, "because")
    service = FakeService([error])
    if not late:
        service.refusal = error
    answer = await post(service, path, {"inputs": "x"})
    assert answer.status_code == status
    assert answer.json() == {"error": "because", "error_type": kind}
    assert ("retry-after" in answer.headers) == retry


async def test_an_error_after_the_first_byte_is_an_event() -> None:
    service = FakeService([*words()[:2], RequestError(Fault.WORKER_LOST, "worker gone")])
    answer = await post(service, "/generate_stream", {"inputs": "x"})
    assert answer.status_code == 200
    events = events_of(answer.text)
    assert [event.get("index") for event in events] == [1, 2, None]
    assert events[-1] == {"error": "worker gone", "error_type": "generation"}
    assert service.open == 0


async def test_a_bug_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/generate", "/generate_stream"):
        service = FakeService()
        service.refusal = ZeroDivisionError("secret")
        answer = await post(service, path, {"inputs": "prompt"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "prompt" not in caplog.text


async def test_tokenize_counts_bytes() -> None:
    answer = await post(FakeService(), "/tokenize", {"inputs": "aî"})
    assert answer.json() == [
        {"id": 64, "text": "a", "start": 0, "stop": 1},
        {"id": 127, "text": "î", "start": 1, "stop": 3},
        {"id": 106, "text": "î", "start": 1, "stop": 3},
    ]
    body = {"messages": [{"role": "user", "content": "h"}]}
    answer = await post(FakeService(), "/chat_tokenize", body)
    assert answer.json()["templated_text"] == "<user>h</><assistant>"
    assert len(answer.json()["tokenize_response"]) == len("<user>h</><assistant>")
    body["messages"].append({"role": "assistant", "content": "so "})
    answer = await post(FakeService(), "/chat_tokenize", body)
    assert answer.json()["templated_text"] == "<user>h</><assistant>so"


async def test_info_health_and_metrics() -> None:
    service = FakeService()
    async with client_of(service) as client:
        info = (await client.get("/info")).json()
        assert info["model_id"] == "m/one"
        assert info["max_total_tokens"] == 2048
        for path in ("/health", "/ping", "/"):
            assert (await client.get(path)).status_code == 200
        assert service.fleet is not None
        service.fleet.up = False
        for path in ("/health", "/ping", "/"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        service.fleet.known = False
        assert (await client.get("/info")).status_code == 503
        metrics = await client.get("/metrics")
        assert metrics.text == "# HELP x y\n"
        assert metrics.headers["content-type"].startswith("text/plain")
