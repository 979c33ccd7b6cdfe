"""What TGI says of bad parameters (router/src/validation.rs), and what it did with good ones."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.fake_service import events_of
from tests.service.test_rest_router import GATEWAY, ROUTER, house_in

SAMPLE = {"do_sample": True}
MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3, **SAMPLE}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "seed": 1, **SAMPLE}, "`seed` must not be set when `best_of` > 1"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"max_new_tokens": 28},
        "`inputs` tokens + `max_new_tokens` must be <= 30. "
        "Given: 3 `inputs` tokens and 28 `max_new_tokens`",
    ),
    # Where TGI took less, or named another limit than it kept to.
    ({"top_p": 1.5}, "`top_p` must be > 0.0 and <= 1.0. Given: 1.5"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and <= 1.0. Given: 0.0"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 21. Given: 0"),
    ({"truncate": 21}, "`truncate` must be strictly positive and less than 21. Given: 21"),
]
OF_STREAMS: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2, **SAMPLE}, "`best_of` != 1 is not supported when streaming tokens"),
    (
        {"decoder_input_details": True},
        "`decoder_input_details` == true is not supported when streaming tokens",
    ),
]


async def test_bad_parameters_get_tgis_words(tmp_path: Path) -> None:
    async with house_in(tmp_path, max_input_tokens=20, max_total_tokens=30) as house:
        for path in ("/generate", "/generate_stream"):
            for parameters, text in MESSAGES + (OF_STREAMS if path.endswith("stream") else []):
                answer = await house.post(path, {"inputs": "abc", "parameters": parameters})
                assert answer.status_code == 422, (path, parameters)
                body = {"error": f"Input validation error: {text}", "error_type": "validation"}
                assert answer.json() == body, (path, parameters)
        for inputs, text in (
            ("", "`inputs` cannot be empty"),
            ("x" * 40, "`inputs` must have less than 21 tokens. Given: 40"),
        ):
            answer = await house.post("/generate", {"inputs": inputs})
            assert answer.json()["error"] == f"Input validation error: {text}"


async def test_the_ends_of_the_ranges_are_taken(tmp_path: Path) -> None:
    taken: dict[str, Any] = {
        "best_of": 2, **SAMPLE, "temperature": 0.01, "repetition_penalty": 0.01,
        "frequency_penalty": -2.0, "top_k": 1, "top_p": 1.0, "typical_p": 1.0,
        "stop": list("wxyz"), "top_n_tokens": 5, "truncate": 20, "max_new_tokens": 10,
    }  # fmt: skip
    async with house_in(tmp_path, max_input_tokens=20, max_total_tokens=30) as house:
        answer = await house.post("/generate", {"inputs": "x" * 40, "parameters": taken})
        assert answer.status_code == 200, answer.text
        neutral = {"inputs": "x", "parameters": {"typical_p": 1.0, "max_new_tokens": 5}}
        greedy = {"inputs": "x", "parameters": {"max_new_tokens": 5}}
        answers = [(await house.post("/generate", body)).json() for body in (neutral, greedy)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("tokens", [1024, 1500])
async def test_a_long_answer_is_one_request_and_as_long_as_it_may_be(
    tmp_path: Path, tokens: int
) -> None:
    """TGI began anew with its own text behind 1024 tokens, and could go on over the limit."""
    async with house_in(tmp_path) as house:
        parameters = {"max_new_tokens": tokens, "details": True}
        body = {"inputs": "x", "parameters": parameters}
        whole = (await house.post("/generate", body)).json()["details"]
        assert (whole["generated_tokens"], whole["finish_reason"]) == (tokens, "length")
        events = events_of((await house.post("/generate_stream", body)).text)
        assert [event["index"] for event in events] == list(range(1, tokens + 1))
        assert [event["token"]["id"] for event in events] == [one["id"] for one in whole["tokens"]]
        assert events[-1]["details"]["input_length"] == 1


@pytest.mark.parametrize("through", [ROUTER, GATEWAY])
async def test_the_prompt_is_time_of_the_model_to_the_headers(tmp_path: Path, through: str) -> None:
    """As to the metrics: what comes before the first plan is the queue, all behind it inference."""
    async with house_in(tmp_path, {"step_ms": "40"}, through=through) as house:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
        times = (await house.post("/generate", body)).headers
    assert int(times["x-inference-time"]) >= 79  # two steps, and a millisecond of rounding
    assert int(times["x-time-per-token"]) >= 39


@pytest.mark.parametrize("spelt", ["<|im_start|>", "then"])
async def test_a_special_token_is_a_stop_text_by_its_name(tmp_path: Path, spelt: str) -> None:
    """TGI looks for stop texts where special tokens show, and leaves those out of the text."""
    worker = {"answer": "Now and<|im_start|> then more"}
    async with house_in(tmp_path, worker) as house:
        parameters = {"stop": ["nowhere", spelt], "details": True}
        body = {"inputs": "x", "parameters": parameters}
        whole = (await house.post("/generate", body)).json()
        assert whole["generated_text"] == {"then": "Now and then"}.get(spelt, "Now and")
        assert whole["details"]["finish_reason"] == "stop_sequence"
        (*_, last) = events_of((await house.post("/generate_stream", body)).text)
        assert last["generated_text"] == whole["generated_text"]
        assert last["token"] == whole["details"]["tokens"][-1]
        if spelt != "then":
            assert (last["token"]["text"], last["token"]["special"]) == (spelt, True)
