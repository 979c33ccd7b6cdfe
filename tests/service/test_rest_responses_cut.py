"""What of a long conversation is left where OpenAI's responses may cut it."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from router.errors import TooLongError
from router.fleet import ModelCard
from tests.service.chat_bench import HERMES, MISTRAL, TemplateService, tokenizer
from tests.service.fake_service import FakeFleet, words
from tests.service.rest_server import client_of
from tests.service.test_metrics_exact import scrape
from tests.service.test_rest_responses import posted
from tests.service.test_rest_router import House, house_in

Items = list[dict[str, Any]]
SYSTEM, NEW = {"role": "system", "content": "s"}, {"role": "user", "content": "new"}


class NarrowFleet(FakeFleet):
    """A model with room for prompts of so many tokens, which are bytes or markers."""

    room = 150

    def models(self) -> tuple[ModelCard, ...]:
        return tuple(replace(card, max_input_tokens=self.room) for card in super().models())


class Narrow(TemplateService):
    """Refuses what is too long. ``rendered`` counts the conversations that were laid out."""

    rendered = 0

    async def generate(self, ask: Any) -> Any:
        if len(self.card(None).tokenizer.encode(ask.prompt, False)) > NarrowFleet.room:
            raise TooLongError("`inputs` must have less", "prompt")
        return await super().generate(ask)

    async def render_chat(self, *args: Any, **variables: Any) -> str:
        self.rendered += 1
        return await super().render_chat(*args, **variables)  # type: ignore[misc]


def narrow(template: str = HERMES) -> Narrow:
    service = Narrow(words())
    service.fleet = NarrowFleet()
    service.fleet.tokenizer = tokenizer(template)
    return service


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


async def left_of(service: Narrow, items: Items) -> str:
    """The prompt that a conversation becomes if it may be cut."""
    status, _ = await posted(service, input=items, truncation="auto")
    assert status == 200
    return str(service.asks[-1].prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_too_long_is_cut_only_if_that_is_asked_for(stream: bool) -> None:
    service = narrow()
    turn = [{"role": "user", "content": "old " * 10}, {"role": "assistant", "content": "a"}]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "old " * 10}
    items = [SYSTEM, *turn, call, output, NEW]
    status, got = await posted(service, input=items, stream=stream)
    assert (status, got["error"]["param"]) == (400, "input")
    assert "`input`" in got["error"]["message"]
    async with client_of(service) as client:
        body = {"input": items, "truncation": "auto", "stream": stream}
        response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200
    prompt = str(service.asks[-1].prompt)
    assert "system\ns<" in prompt
    assert "user\nnew<" in prompt
    assert "old" not in prompt
    status, _ = await posted(service, input="new " * 100, truncation="auto", stream=stream)
    assert status == 400


async def test_no_more_is_left_out_than_has_to_be() -> None:
    prompt = await left_of(narrow(), [said("user", f"{number:040}") for number in range(9)])
    assert prompt.count("user\n0") == 2
    prompt = await left_of(narrow(), [said("user", "a"), said("assistant", "b"), NEW])
    assert prompt.count("<|im_start|>") == 4


async def test_what_is_left_begins_with_the_user_where_a_template_wants_that() -> None:
    alternating = MISTRAL.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}",
        1,
    )
    turn = [said("user", "u" * 20), said("assistant", "a" * 20)]
    prompt = await left_of(narrow(alternating), [*turn * 5, NEW])
    assert prompt == "<s>" + ("[INST]" + "u" * 20 + "[/INST]" + "a" * 20) * 2 + "[INST]new[/INST]"


async def test_a_task_of_one_user_goes_last() -> None:
    """Where there is no other way, what the model did most recently stays."""
    did = [said("assistant", f"did {number} " + "x" * 30) for number in range(6)]
    prompt = await left_of(narrow(), [said("user", "task"), *did])
    assert "did 5" in prompt
    assert "did 0" not in prompt


async def test_few_conversations_are_laid_out_however_many_messages_there_are() -> None:
    service = narrow()
    await left_of(service, [said("user", "a") for _ in range(2000)])
    assert service.rendered < 20


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with house_in(tmp_path, max_total_tokens=60) as house:
        yield house


async def test_a_conversation_that_was_cut_is_one_request(house: House) -> None:
    items = [said("user", "the way " * 4) for _ in range(8)]
    body = {"input": items, "truncation": "auto", "max_output_tokens": 3, "temperature": 0}
    answer = await house.post("/v1/responses", body)
    assert answer.status_code == 200, answer.text
    seen = await scrape(house)
    assert seen["tgi_request_count"] == seen["tgi_request_success"] == 1
