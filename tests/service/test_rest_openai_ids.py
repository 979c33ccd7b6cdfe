"""vLLM's ``return_token_ids``: what was sampled, to the token, for those who train on it."""

from typing import Any

import pytest

from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason
from tests.service.fake_service import FakeService, Step, events_of
from tests.service.rest_server import chat, complete

PROMPT = list(range(70, 77))
ASKED: dict[str, Any] = {"return_token_ids": True}


def held() -> list[Step]:
    """Three tokens, the first without a text of its own yet, the last an end of sequence."""
    first, second, end = TokenOut(5, ""), TokenOut(6, "é"), TokenOut(0, "</s>", True)
    finish = Finish(Reason.EOS, "é", 7, 3)
    return [Chunk((first,), ""), Chunk((second,), "é"), Chunk((end,), "", finish)]


async def test_chats_have_the_ids_of_all_that_was_generated() -> None:
    answer = (await chat(FakeService(held()), **ASKED, n=2)).json()
    assert answer["prompt_token_ids"] == PROMPT
    assert [choice["token_ids"] for choice in answer["choices"]] == [[5, 6, 0]] * 2


async def test_completions_have_those_of_each_prompt_beside_them() -> None:
    fields = {"prompt": ["a", "b"], "echo": True}
    answer = (await complete(FakeService(held()), **ASKED, **fields)).json()
    for choice, text in zip(answer["choices"], ("aé", "bé"), strict=True):
        assert choice["text"] == text
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, [5, 6, 0])


async def test_a_scored_prompt_has_no_ids_of_an_answer() -> None:
    fields = {"echo": True, "max_tokens": 0}
    for stream in (False, True):
        got = await complete(FakeService(held()), **ASKED, **fields, stream=stream)
        events = events_of(got.text)[:-1] if stream else [got.json()]
        choices = [event["choices"][0] for event in events]
        assert [choice["token_ids"] for choice in choices] == [[]] * len(events)
        assert choices[0]["prompt_token_ids"] == PROMPT


@pytest.mark.parametrize("speak", [chat, complete])
async def test_every_token_has_an_event(speak: Any) -> None:
    """One whose text is not known yet, too; the prompt's ids come once for each choice."""
    got = await speak(FakeService(held()), **ASKED, n=2, stream=True)
    ids: dict[int, list[int]] = {0: [], 1: []}
    prompts: dict[int, list[Any]] = {0: [], 1: []}
    for event in events_of(got.text)[:-1]:
        (choice,) = event["choices"]
        ids[choice["index"]] += choice["token_ids"]
        holder = event if speak is chat else choice
        prompts[choice["index"]].append(holder.get("prompt_token_ids"))
    assert ids == {0: [5, 6, 0], 1: [5, 6, 0]}
    assert prompts == {0: [PROMPT, None, None], 1: [PROMPT, None, None]}


@pytest.mark.parametrize("speak", [chat, complete])
@pytest.mark.parametrize("stream", [False, True])
async def test_who_does_not_ask_gets_none(speak: Any, stream: bool) -> None:
    for fields in ({}, {"return_token_ids": False}):
        got = await speak(FakeService(held()), **fields, stream=stream)
        assert got.status_code == 200
        assert "token_ids" not in got.text
