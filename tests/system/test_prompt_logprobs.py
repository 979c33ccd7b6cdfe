"""Log probabilities of prompts of the real model: what a prompt says of an answer it holds."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.server import Server, serving

# Longer than the 64 tokens of a step, so that it is computed in chunks.
STORY = "The railway came to the valley in the spring, and with it came the post. " * 8
STEP_TOKENS = "64"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Exact: logits do not depend on how a prompt was cut.
    options = ("--engine-option", "exact=1", "--max-batch-prefill-tokens", STEP_TOKENS)
    with serving(tmp_path_factory.mktemp("prompts"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # On the real model, where a sequence lies in memory still changes a logit's last digits.
    options = ("--engine", "scripted", "--max-batch-prefill-tokens", STEP_TOKENS)
    with serving(tmp_path_factory.mktemp("scripted"), *options) as server:
        yield server


def details(server: Server, text: str, **more: object) -> dict[str, Any]:
    parameters = {"details": True, "max_new_tokens": 12, **more}
    answer = server.client.post("/generate", json={"inputs": text, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return {**body["details"], "text": body["generated_text"]}


def scored(server: Server, text: str) -> list[dict[str, Any]]:
    prefill: list[dict[str, Any]] = details(server, text, decoder_input_details=True)["prefill"]
    return prefill


def test_an_answer_is_as_likely_in_a_prompt_as_it_was_when_drawn(server: Server) -> None:
    drawn = details(server, STORY)
    assert drawn["prefill"] == []
    prefill = scored(server, STORY + drawn["text"])
    assert prefill[0]["logprob"] is None
    assert "".join(token["text"] for token in prefill) == STORY + drawn["text"]
    behind = prefill[-len(drawn["tokens"]) :]
    assert [token["id"] for token in behind] == [token["id"] for token in drawn["tokens"]]
    assert [token["logprob"] for token in behind] == pytest.approx(
        [token["logprob"] for token in drawn["tokens"]], abs=1e-3
    )


def test_who_else_is_there_and_what_is_known_already_changes_nothing(scripted: Server) -> None:
    alone = scored(scripted, STORY)
    assert len(alone) > 2 * int(STEP_TOKENS)
    assert all(token["logprob"] <= 0 for token in alone[1:])
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(details, scripted, STORY[: 40 * n]) for n in range(2, 6)]
        again = [pool.submit(scored, scripted, STORY) for _ in range(2)]
        assert [one.result() for one in again] == [alone, alone]
        assert all(one.result()["generated_tokens"] for one in others)
