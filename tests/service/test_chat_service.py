"""Chats: what the model is shown, what is asked of the service, what the client gets."""

import json
from dataclasses import replace
from typing import Any

import pytest

from router.ask import ConstraintKind, Params
from router.conversation import ChatAsk, ToolMode
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.text import constraints
from tests.service.chat_bench import (
    CHATML,
    HERMES,
    LLAMA,
    MAY_THINK,
    MISTRAL,
    SPECIALS,
    THINKER,
    TOOLS,
    USER,
    answer,
    chats,
    said,
    tokenizer,
)

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
CALLED = [("get_weather", '{"city": "Köln"}')]
SCHEMA = constraints.json_schema({"type": "object"}, "response_format")


async def test_a_plain_chat() -> None:
    chat, service = chats(CHATML, said("It", " rains."))
    params = Params(temperature=0.5, stop=("x",))
    ask = ChatAsk(USER, params, adapter="a", priority=2, deadline_s=3.0)
    got = await answer(chat, ask)
    assert (got.text, got.reasoning, got.calls) == ("It rains.", "", [])
    assert got.finish is not None
    assert not got.finish.called
    (sent,) = service.asks
    assert sent.prompt == (
        "<|im_start|>user\nHow is the weather?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (sent.adapter, sent.priority, sent.deadline_s) == ("a", 2, 3.0)
    assert not sent.add_special_tokens
    assert sent.params == params
    assert service.open == 0


async def test_auto_may_call_and_is_not_forced() -> None:
    chat, service = chats(HERMES, said("I will look.\n", *CALL, "\n", *CALL))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert got.text == "I will look."
    assert got.texts[0] == "I will look."
    assert got.named == CALLED * 2
    assert got.finish is not None
    assert got.finish.called
    assert len({call[0] for call in got.calls}) == 2
    (sent,) = service.asks
    assert sent.params.constraint is None
    assert json.dumps(TOOLS[0].entry) in str(sent.prompt)


async def test_none_neither_shows_the_tools_nor_looks_for_calls() -> None:
    chat, service = chats(HERMES, said(CALL))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS, mode=ToolMode.NONE))
    assert (got.text, got.calls) == (CALL, [])
    assert "get_weather" not in str(service.asks[0].prompt)


async def test_required_is_forced() -> None:
    chat, service = chats(HERMES, said(CALL))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS, mode=ToolMode.REQUIRED))
    assert got.named == CALLED
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert (constraint.kind, constraint.field) == (ConstraintKind.LARK, "tool_choice")
    assert "get_weather" in constraint.text
    assert "now" in constraint.text
    assert "{0,15}" in constraint.text


async def test_a_named_tool_is_the_only_one_and_called_once() -> None:
    chat, service = chats(HERMES, said(CALL))
    ask = ChatAsk(USER, tools=TOOLS, mode=ToolMode.REQUIRED, tool="get_weather")
    assert (await answer(chat, ask)).named == CALLED
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert "now" not in constraint.text
    assert "{0,15}" not in constraint.text
    assert '"now"' in str(service.asks[0].prompt)  # the model knows of all


async def test_without_parallel_calls_there_is_one() -> None:
    chat, service = chats(HERMES, said(CALL, CALL), said(CALL))
    ask = ChatAsk(USER, tools=TOOLS, parallel_calls=False)
    got = await answer(chat, ask)
    assert (got.text, got.named) == ("", CALLED)
    await answer(chat, replace(ask, mode=ToolMode.REQUIRED))
    constraint = service.asks[1].params.constraint
    assert constraint is not None
    assert "{0,15}" not in constraint.text


async def test_a_call_of_an_unknown_function_is_text() -> None:
    chat, _ = chats(HERMES, said(CALL.replace("get_weather", "get_time")))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert got.text == CALL.replace("get_weather", "get_time")
    assert got.finish is not None
    assert not got.finish.called


@pytest.mark.parametrize(
    ("pieces", "reason", "called"),
    [
        ((CALL,), Reason.EOS, True),
        ((CALL,), Reason.STOP_STRING, True),
        ((CALL,), Reason.LENGTH, False),
        ((CALL[:-20],), Reason.EOS, False),
        ((CALL.replace('"}', '" 1}'),), Reason.EOS, False),
    ],
)
async def test_called_says_that_the_calls_are_complete(
    pieces: tuple[str, ...], reason: Reason, called: bool
) -> None:
    chat, _ = chats(HERMES, said(*pieces, reason=reason))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert got.finish is not None
    assert got.finish.called == called
    assert len(got.calls) == 1


async def test_markers_that_are_special_tokens_reach_the_reader_and_no_client() -> None:
    chat, service = chats(MISTRAL, said('[TOOL_CALLS][{"name": "now", "arguments": {}}]'))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert (got.text, got.named) == ("", [("now", "{}")])
    ids = {mark: tokenizer(MISTRAL).token_id(mark) for mark in SPECIALS}
    wanted = {ids["[TOOL_CALLS]"], ids["[ARGS]"], ids["[CALL_ID]"]}
    assert service.asks[0].params.kept_tokens == wanted
    chat, service = chats(LLAMA, said("<|python_tag|>print()"))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert got.text == "print()"
    assert service.asks[0].params.kept_tokens == {ids["<|python_tag|>"]}


async def test_a_model_without_tools_is_told_of_them() -> None:
    chat, service = chats(CHATML, said('{"name": "now", "arguments": {}}'))
    system = {"role": "system", "content": "Be brief."}
    got = await answer(chat, ChatAsk((system, *USER), tools=TOOLS))
    assert got.named == [("now", "{}")]
    prompt = str(service.asks[0].prompt)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n")
    assert prompt.count("<|im_start|>system") == 1
    for one in TOOLS:
        assert json.dumps(one.entry["function"]) in prompt
    assert "JSON list" in prompt
    await answer(chat, ChatAsk(USER, tools=TOOLS, parallel_calls=False))
    prompt = str(service.asks[1].prompt)
    assert prompt.startswith("<|im_start|>system\nYou can call these functions")
    assert "JSON list" not in prompt


async def test_a_model_without_system_messages_is_told_in_the_first_one() -> None:
    template = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}",
    )
    chat, service = chats(template, said("Yes."))
    await answer(chat, ChatAsk(USER, tools=TOOLS))
    prompt = str(service.asks[0].prompt)
    assert prompt.startswith("<|im_start|>user\nYou can call these functions")
    assert "How is the weather?<|im_end|>" in prompt


HISTORY = (
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
)  # fmt: skip


async def test_results_go_back_through_the_template() -> None:
    chat, service = chats(HERMES, said("It rains."))
    await answer(chat, ChatAsk(HISTORY, tools=TOOLS))
    prompt = str(service.asks[0].prompt)
    assert CALL in prompt
    assert '{"name": "now", "arguments": {}}' in prompt
    assert "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>" in prompt


async def test_results_go_back_as_text_where_the_template_knows_none() -> None:
    chat, service = chats(CHATML, said("It rains."))
    await answer(chat, ChatAsk(HISTORY, tools=TOOLS))
    prompt = str(service.asks[0].prompt)
    calls = [
        {"name": "get_weather", "arguments": {"city": "Köln"}},
        {"name": "now", "arguments": {}},
    ]
    assert f"assistant\n{json.dumps(calls, ensure_ascii=False)}<|im_end|>" in prompt
    assert "user\nResult of get_weather:\nrain\nResult of now:\nnoon<|im_end|>" in prompt


async def test_mistral_gets_ids_that_it_takes() -> None:
    chat, service = chats(MISTRAL, said("It rains."))
    await answer(chat, ChatAsk(HISTORY, tools=TOOLS))
    prompt = str(service.asks[0].prompt)
    one = prompt.partition('"id": "')[2][:9]
    assert one.isalnum()
    assert f"[TOOL_RESULTS]rain {one}[/TOOL_RESULTS]" in prompt
    assert f"[TOOL_RESULTS]noon {one}" not in prompt


async def test_a_template_for_tools_is_chosen_by_itself() -> None:
    chat, service = chats(CHATML, said("a"), more=(("tool_use", HERMES), ("terse", "terse")))
    await answer(chat, ChatAsk(USER))
    assert "<tools>" not in str(service.asks[-1].prompt)
    await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert "<tools>" in str(service.asks[-1].prompt)
    await answer(chat, ChatAsk(HISTORY))
    assert CALL in str(service.asks[-1].prompt)
    await answer(chat, ChatAsk(USER, tools=TOOLS, template="default"))
    assert "<tools>" not in str(service.asks[-1].prompt)
    await answer(chat, ChatAsk(USER, template="terse"))
    assert service.asks[-1].prompt == "terse"
    with pytest.raises(RequestError) as caught:
        await chat.chat(ChatAsk(USER, template="other"))
    assert caught.value.field == "chat_template"


async def test_thoughts_are_told_from_the_answer() -> None:
    chat, service = chats(THINKER, said("Hm", "m.\n</th", "ink>\n\nRain."))
    got = await answer(chat, ChatAsk(USER))
    assert (got.text, got.reasoning) == ("Rain.", "Hmm.")
    assert str(service.asks[0].prompt).endswith("<think>\n")
    chat, _ = chats(HERMES, said("<think>\nHmm.\n</think>\n\nRain."))
    got = await answer(chat, ChatAsk(USER))
    assert (got.text, got.reasoning) == ("Rain.", "Hmm.")


async def test_thoughts_may_stay_in_the_text() -> None:
    chat, service = chats(THINKER, said("Hmm.\n</think>\n\nRain."))
    got = await answer(chat, ChatAsk(USER, Params(constraint=SCHEMA), reasoning=False))
    assert (got.text, got.reasoning) == ("Hmm.\n</think>\n\nRain.", "")
    assert service.asks[0].params.constraint is SCHEMA


async def test_thoughts_then_calls() -> None:
    chat, _ = chats(THINKER, said(f'Maybe <tool_call> or {{"name"}}.</think>\n\n{CALL}'))
    got = await answer(chat, ChatAsk(USER, tools=TOOLS))
    assert (got.text, got.named) == ("", CALLED)
    assert got.reasoning == 'Maybe <tool_call> or {"name"}.'


@pytest.mark.parametrize(
    ("template", "start"),
    [(CHATML, None), (THINKER, "start: thoughts (answer)"), (MAY_THINK, "start: thoughts? (")],
)
async def test_a_constraint_is_for_what_follows_the_thoughts(
    template: str, start: str | None
) -> None:
    chat, service = chats(template, said("{}"))
    await answer(chat, ChatAsk(USER, Params(constraint=SCHEMA)))
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert constraint.field == "response_format"
    if start is None:
        assert constraint is SCHEMA
    else:
        assert constraint.text.startswith(start)


async def test_a_prompt_that_has_ended_the_thoughts_leaves_no_room_for_them() -> None:
    template = MAY_THINK.replace(
        "assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    chat, service = chats(template, said("{}"))
    await answer(chat, ChatAsk(USER, Params(constraint=SCHEMA)))
    assert service.asks[0].params.constraint is SCHEMA


async def test_a_constrained_answer_or_calls() -> None:
    chat, service = chats(HERMES, said(CALL), said('{"a": 1}'))
    ask = ChatAsk(USER, Params(constraint=SCHEMA), tools=TOOLS)
    assert (await answer(chat, ask)).named == CALLED
    assert (await answer(chat, ask)).text == '{"a": 1}'
    constraint = service.asks[0].params.constraint
    assert constraint is not None
    assert constraint.text.startswith("start: answer | calls")


async def test_going_on_with_the_last_message() -> None:
    chat, service = chats(CHATML, said(" a time"))
    messages = (*USER, {"role": "assistant", "content": "Once upon "})
    await answer(chat, ChatAsk(messages, continuing=True))
    assert str(service.asks[0].prompt).endswith("<|im_start|>assistant\nOnce upon")
    messages = (*USER, {"role": "assistant", "content": "<think>\nWell"})
    chat, _ = chats(HERMES, said(" so</think>Yes"))
    got = await answer(chat, ChatAsk(messages, continuing=True))
    assert (got.reasoning, got.text) == ("so", "Yes")


@pytest.mark.parametrize("begun", ["e", "<", "end", "<|im_end|>", "T", "x\nCUT_THE_PROMPT_HERE"])
@pytest.mark.parametrize("template", [CHATML, HERMES, LLAMA, MISTRAL])
async def test_the_prompt_ends_behind_a_begun_answer_whatever_it_is(
    template: str, begun: str
) -> None:
    """Not in the marker that closes its message, where the same letters stand."""
    chat, service = chats(template, said("a"))
    head = str((await chat.render(ChatAsk(USER)))[1])
    await answer(chat, ChatAsk((*USER, {"role": "assistant", "content": begun}), continuing=True))
    assert service.asks[0].prompt == head + begun


BEGUN = {"role": "assistant", "content": "Once upon "}
MADE = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
LOUD = CHATML.replace("m.content", "m.content | upper")


@pytest.mark.parametrize(
    ("template", "last", "end"),
    [
        (CHATML, BEGUN, "<|im_start|>assistant\nOnce upon"),
        (CHATML, {**BEGUN, "content": " "}, "<|im_start|>assistant\n"),
        (CHATML, {**BEGUN, "role": "user"}, "<|im_start|>assistant\n"),
        (HERMES, {**BEGUN, "tool_calls": MADE}, "<|im_start|>assistant\n"),
        (LOUD, BEGUN, "ONCE UPON <|im_end|>\n<|im_start|>assistant\n"),
    ],
)
async def test_a_begun_answer_is_seen_if_nobody_says_so(
    template: str, last: dict[str, Any], end: str
) -> None:
    """It needs a text that the template shows, and no calls; else the message is answered."""
    chat, service = chats(template, said("a"))
    await answer(chat, ChatAsk((*USER, last), continuing=None))
    prompt = str(service.asks[0].prompt)
    assert prompt.endswith(end)
    await answer(chat, ChatAsk((*USER, last), continuing=False))
    assert (service.asks[1].prompt == prompt) == (end != "<|im_start|>assistant\nOnce upon")


async def test_a_prompt_without_a_header() -> None:
    chat, service = chats(CHATML, said("a"))
    await answer(chat, ChatAsk(USER, opening=False))
    assert str(service.asks[0].prompt).endswith("<|im_end|>\n")


async def test_render_gives_the_prompt_of_the_chat() -> None:
    chat, service = chats(HERMES, said("a"))
    ask = ChatAsk(HISTORY, tools=TOOLS)
    card, prompt = await chat.render(ask)
    assert card.id == "m/one"
    await answer(chat, ask)
    assert service.asks[0].prompt == prompt


async def test_variables_reach_the_template() -> None:
    chat, _ = chats("{{ enable_thinking }}", said("a"))
    assert (await chat.render(ChatAsk(USER, variables={"enable_thinking": False})))[1] == "False"


async def test_leaving_cancels_the_request() -> None:
    chat, service = chats(CHATML, said("a", "b"))
    async with await chat.chat(ChatAsk(USER)) as generation:
        await anext(generation)
        assert service.open == 1
    assert (service.open, service.cancelled) == (0, 1)


async def test_a_failure_breaks_off() -> None:
    fault = RequestError(Fault.WORKER_LOST, "gone")
    chat, _ = chats(CHATML, [*said("a", "b")[:1], fault])
    with pytest.raises(RequestError, match="gone"):
        await answer(chat, ChatAsk(USER))
