import openai
import pytest

from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason
from tests.service.fake_service import FakeFleet, FakeService, Step, events_of, words
from tests.service.rest_server import complete, serving

PROMPT = (
    TokenOut(1, "<s>", True),
    TokenOut(2, "Hé", False, -1.5, ((3, "Ho", -0.5), (2, "Hé", -1.5)), 30),
    TokenOut(4, "!", False, -2.5, ((3, "Ho", -0.5), (5, "?", -float("inf"))), 4000),
)


def scored(*, tops: int = 0) -> list[Step]:
    """An answer `ab`, `c` and an end, to a prompt whose tokens have been scored."""
    (first, *_), (second, *_) = (chunk.tokens for chunk in words(("ab", "c"), tops=tops))  # type: ignore[union-attr]
    end = TokenOut(0, "</s>", True, -0.25)
    finish = Finish(Reason.EOS, "abc", 3, 3, prompt=PROMPT)
    return [Chunk((first,), "ab"), Chunk((second, end), "c", finish)]


async def test_completions_have_openais_shape() -> None:
    answer = await complete(FakeService(), service_tier="auto")
    openai.types.Completion.model_validate(answer.json())
    body = answer.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body.pop("created") > 1_600_000_000
    text = "Once upon a tîme 🙂"
    assert body == {
        "object": "text_completion",
        "model": "m/one",
        "service_tier": "default",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_streams_end_with_usage_if_it_was_asked_for() -> None:
    options = {"include_usage": True, "include_obfuscation": True}
    answer = await complete(FakeService(), stream=True, stream_options=options, seed=1)
    *events, usage, done = events_of(answer.text)
    assert done == "[DONE]"
    assert [event["usage"] for event in events] == [None] * 5
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 4 + ["length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)


async def test_logprobs_are_parallel_lists() -> None:
    whole = await complete(FakeService(words(("ab", "c"), tops=2)), logprobs=1)
    assert whole.json()["choices"][0]["logprobs"] == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"t0": 0.0, "ab": -0.5}, {"t0": 0.0, "c": -0.5}],
        "text_offset": [0, 2],
    }
    stream = await complete(FakeService(words(("ab", "c"), tops=1)), logprobs=0, stream=True)
    parts = [event["choices"][0]["logprobs"] for event in events_of(stream.text)[:-1]]
    assert [part["text_offset"] for part in parts] == [[0], [2]]
    assert parts[0]["top_logprobs"] is None


async def test_of_tokens_with_the_same_text_the_likeliest_is_told() -> None:
    top = ((1, "\ufffd", -0.25), (2, "\ufffd", -2.0), (3, "b", -3.0))
    out = TokenOut(9, "a", False, -4.0, top)
    service = FakeService([Chunk((out,), "a", Finish(Reason.LENGTH, "a", 1, 1))])
    (choice,) = (await complete(service, logprobs=3)).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.25, "b": -3.0, "a": -4.0}]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_in_front(stream: bool) -> None:
    def texts(answer: str) -> str:
        return "".join(event["choices"][0]["text"] for event in events_of(answer)[:-1])

    for prompt, expected in (("x", "xabc"), ([64, 65], "ababc")):
        service = FakeService(words(("ab", "c")))
        answer = await complete(service, prompt=prompt, echo=True, stream=stream)
        got = texts(answer.text) if stream else answer.json()["choices"][0]["text"]
        assert got == expected


EXPECTED = {
    "tokens": ["<s>", "Hé", "!", "ab", "c", "</s>"],
    "token_logprobs": [None, -1.5, -2.5, -0.5, -0.5, -0.25],
    "top_logprobs": [
        None,
        {"Ho": -0.5, "Hé": -1.5},
        {"Ho": -0.5, "?": -9999.0, "!": -2.5},
        {"t0": 0.0, "t1": -1.0, "ab": -0.5},
        {"t0": 0.0, "t1": -1.0, "c": -0.5},
        {"</s>": -0.25},
    ],
    "text_offset": [0, 0, 2, 3, 5, 6],
}


async def test_echo_with_logprobs_scores_the_prompt() -> None:
    service = FakeService(scored(tops=2))
    answer = await complete(service, prompt="Hé!", echo=True, logprobs=2)
    (choice,) = answer.json()["choices"]
    assert choice["text"] == "Hé!abc"
    assert choice["logprobs"] == EXPECTED
    params = service.asks[0].params
    assert (params.prompt_logprobs, params.logprobs, params.top_logprobs) == (True, True, 2)


async def test_echo_with_logprobs_scores_the_prompt_in_streams_too() -> None:
    service = FakeService(scored(tops=2))
    answer = await complete(service, prompt="Hé!", echo=True, logprobs=2, stream=True)
    first, second, _ = events_of(answer.text)
    assert first["choices"][0]["text"] == "Hé!ab"
    logprobs = [event["choices"][0]["logprobs"] for event in (first, second)]
    joined = {name: logprobs[0][name] + logprobs[1][name] for name in EXPECTED}
    assert joined == EXPECTED


@pytest.mark.parametrize("stream", [False, True])
async def test_no_tokens_with_echo_is_the_prompt_alone(stream: bool) -> None:
    service = FakeService(scored())
    fields = {"prompt": "Hé!", "echo": True, "max_tokens": 0, "logprobs": 1, "stream": stream}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await complete(service, **fields, **options)
    body = events_of(answer.text) if stream else [answer.json()]
    choices = [choice for event in body if event != "[DONE]" for choice in event["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Hé!"
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.5, -2.5]
    assert all(choice["logprobs"]["tokens"] == [] for choice in choices[1:])
    usage = body[-2 if stream else -1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    assert service.asks[0].params.max_tokens == 1
    assert (await complete(service, max_tokens=0)).json()["error"]["param"] == "max_tokens"


async def test_prompt_logprobs_are_reported_as_vllm_does() -> None:
    service = FakeService(scored())
    answer = await complete(service, prompt_logprobs=1)
    (choice,) = answer.json()["choices"]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "2": {"logprob": -1.5, "rank": 30, "decoded_token": "Hé"},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": "Ho"},
        },
        {
            "4": {"logprob": -2.5, "rank": 4000, "decoded_token": "!"},
            "3": {"logprob": -0.5, "rank": 1, "decoded_token": "Ho"},
        },
    ]
    params = service.asks[0].params
    assert (params.prompt_logprobs, params.logprobs, params.top_logprobs) == (True, False, 1)
    stream = await complete(service, prompt_logprobs=1, stream=True)
    assert stream.json()["error"]["param"] == "prompt_logprobs"


async def test_best_of_returns_those_with_the_highest_mean_logprob() -> None:
    service = FakeService(*(words((text,), mean=mean) for text, mean in
                            (("a", -3.0), ("b", -1.0), ("c", -2.0), ("d", -1.5))))  # fmt: skip
    answer = await complete(service, prompt=["x", "y"], n=1, best_of=2)
    body = answer.json()
    assert [choice["text"] for choice in body["choices"]] == ["b", "d"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert all(ask.params.logprobs for ask in service.asks)
    # All that was generated counts; a prompt counts once.
    assert (body["usage"]["completion_tokens"], body["usage"]["prompt_tokens"]) == (4, 14)
    assert (await complete(service, n=2, best_of=1)).json()["error"]["param"] == "best_of"
    assert (await complete(service, best_of=2, stream=True)).json()["error"]["param"] == "best_of"
    same = await complete(service, n=2, best_of=2, stream=True)
    assert same.status_code == 200


async def test_what_no_engine_can_score_is_refused_by_the_clients_name_for_it() -> None:
    service = FakeService()
    service.fleet = FakeFleet()
    service.fleet.features = ("penalties",)
    for fields, param in (
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"best_of": 2}, "best_of"),
    ):
        error = (await complete(service, **fields)).json()["error"]
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")


async def test_prompts_of_all_kinds_in_index_order() -> None:
    for prompt, expected in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ):
        service = FakeService()
        answer = await complete(service, prompt=prompt, n=2, add_special_tokens=False)
        assert answer.status_code == 200
        assert [ask.prompt for ask in service.asks] == [p for p in expected for _ in range(2)]
        assert not any(ask.add_special_tokens for ask in service.asks)
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * len(expected)))
        assert answer.json()["usage"]["prompt_tokens"] == 7 * len(expected)


async def test_the_openai_client_reads_completions() -> None:
    service = FakeService(scored(tops=1))
    async with (
        serving(service) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        whole = await client.completions.create(model="tgi", prompt="Hé!", logprobs=1, echo=True)
        (choice,) = whole.choices
        assert (choice.text, choice.finish_reason) == ("Hé!abc", "stop")
        assert choice.logprobs is not None
        assert choice.logprobs.text_offset == [0, 0, 2, 3, 5, 6]
        assert whole._request_id is not None
        stream = await client.completions.create(model="tgi", prompt=[[1, 2], [3]], stream=True)
        texts = {0: "", 1: ""}
        async for event in stream:
            texts[event.choices[0].index] += event.choices[0].text
        assert texts == {0: "abc", 1: "abc"}
