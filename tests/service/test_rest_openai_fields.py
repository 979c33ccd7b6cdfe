"""Fields of OpenAI's chats that change the prompt, the queue, or what is reported."""

import pytest

from router.ask import Chunk, Finish, TokenOut
from router.core.events import Reason
from tests.service.chat_bench import CHATML, TemplateService, tokenizer
from tests.service.fake_service import FakeFleet, FakeService, events_of, words
from tests.service.rest_server import chat

THINKS = CHATML + "{% if enable_thinking %}<think>{% endif %}{{ verbosity }}{{ reasoning_effort }}"


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        ("none", {"enable_thinking": False, "reasoning_effort": "none"}),
        ("high", {"enable_thinking": True, "reasoning_effort": "high"}),
    ],
)
async def test_hints_become_variables_that_the_template_reads(
    effort: str, expected: dict[str, object]
) -> None:
    service = FakeService()
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(THINKS)
    fields = {"reasoning_effort": effort, "verbosity": "low", "guideline": "g", "documents": [{}]}
    assert (await chat(service, **fields)).status_code == 200
    more = {"verbosity": "low", "guideline": "g", "documents": [{}]}
    assert service.variables == {"add_generation_prompt": True, **expected, **more}
    kwargs = {"enable_thinking": "maybe"}
    assert (await chat(service, **fields, chat_template_kwargs=kwargs)).status_code == 200
    assert service.variables["enable_thinking"] == "maybe"


async def test_thinking_cannot_be_forbidden_to_a_template_that_has_no_switch() -> None:
    service = FakeService()
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(CHATML + "<think>")
    answer = await chat(service, reasoning_effort="none")
    assert answer.json()["error"]["param"] == "reasoning_effort"
    assert (await chat(service, reasoning_effort="medium")).status_code == 200


async def test_templates_are_named() -> None:
    service = TemplateService()
    service.fleet = FakeFleet()
    service.fleet.tokenizer = tokenizer(CHATML, (("short", "{{ messages[0].content }}"),))
    assert (await chat(service, chat_template="short")).status_code == 200
    assert service.asks[0].prompt == "Hi"


TIERS = [
    (None, 1, None), ("auto", 1, "default"), ("default", 1, "default"), ("scale", 1, "default"),
    ("flex", 2, "flex"), ("priority", 0, "priority"), ("fast", 0, "priority"),
]  # fmt: skip


@pytest.mark.parametrize(("tier", "priority", "answered"), TIERS)
async def test_service_tiers_are_priorities(
    tier: str | None, priority: int, answered: str | None
) -> None:
    service = FakeService()
    whole = await chat(service, service_tier=tier)
    stream = await chat(service, service_tier=tier, stream=True)
    assert [ask.priority for ask in service.asks] == [priority] * 2
    assert whole.json().get("service_tier") == answered
    events = events_of(stream.text)[:-1]
    assert [event.get("service_tier") for event in events] == [answered] * len(events)


async def test_prompt_logprobs_of_a_chat() -> None:
    token = TokenOut(2, "Hi", False, -1.5, ((2, "Hi", -1.5),), 1)
    finish = Finish(Reason.EOS, "", 2, 1, prompt=(TokenOut(1, "<s>", True), token))
    service = FakeService([Chunk((), "", finish)])
    answer = await chat(service, prompt_logprobs=1, logprobs=True)
    position = {"2": {"logprob": -1.5, "rank": 1, "decoded_token": "Hi"}}
    assert answer.json()["prompt_logprobs"] == [None, position]
    params = service.asks[0].params
    assert (params.prompt_logprobs, params.ranks, params.top_logprobs) == (True, True, 1)
    streamed = await chat(service, prompt_logprobs=1, stream=True)
    assert streamed.json()["error"]["param"] == "prompt_logprobs"


async def test_more_likeliest_tokens_of_the_prompt_are_not_shown_with_the_answer() -> None:
    service = FakeService(words(("a",), tops=3))
    answer = await chat(service, prompt_logprobs=3, logprobs=True, top_logprobs=1)
    (entry,) = answer.json()["choices"][0]["logprobs"]["content"]
    assert [top["token"] for top in entry["top_logprobs"]] == ["t0"]
    assert service.asks[0].params.top_logprobs == 3
