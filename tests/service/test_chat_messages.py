"""Conversations in the shape that each template can read."""

from typing import Any

import pytest

from router.conversation import ChatAsk
from router.text.messages import for_template, laid_open
from router.text.template import ChatTemplate
from router.text.tools.formats import FORMATS, PLAIN, ToolFormat, format_of
from router.text.tools.reader import ToolReader
from tests.service.chat_bench import CHATML, HERMES, LLAMA, MISTRAL, TOOLS, USER, chats, said

TEXT = {"properties": {"a": {"type": "string"}}}
FORMS = {form.name: form for form in (*FORMATS, PLAIN)}


def call(number: int, name: str = "f", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{number}", "type": "function", "function": function}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": f"r{number}"}


TWO: list[Any] = [
    *USER,
    {"role": "assistant", "content": "I look.", "tool_calls": [call(1, a=1), call(2, "g")]},
    result(2),
    result(1),
    {"role": "user", "content": "Thanks."},
]


async def prompt(template: str, messages: list[Any]) -> str:
    chat, _ = chats(template, said("a"))
    return (await chat.render(ChatAsk(messages, tools=TOOLS)))[1]


async def test_calls_one_by_one_where_a_model_makes_them_so() -> None:
    found = await prompt(LLAMA, TWO)
    places = [found.index(part) for part in ('"f"', "r1", '"g"', "r2", "Thanks.")]
    assert places == sorted(places)
    found = await prompt(HERMES, TWO)
    places = [found.index(part) for part in ('"f"', '"g"', "r2", "r1", "Thanks.")]
    assert places == sorted(places)


def test_results_that_belong_to_no_call_are_kept() -> None:
    messages = [*laid_open(TWO), result(3)]
    messages.insert(2, result(4))
    shown = for_template(messages, ChatTemplate(LLAMA, "", ""), FORMS["llama3"], native=True)
    told = [message["content"] for message in shown if message["role"] == "tool"]
    assert sorted(told) == ["r1", "r2", "r3", "r4"]
    assert [len(message.get("tool_calls", ())) for message in shown].count(1) == 2


async def test_calls_that_a_template_leaves_out_are_text() -> None:
    template = HERMES.replace("m.tool_calls", "m.nothing")
    found = await prompt(template, TWO)
    assert (
        'assistant\nI look.\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>'
    ) in found
    assert "<|im_start|>tool\nr2<|im_end|>" in found


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("count", [1, 2])
def test_what_is_written_is_read(form: ToolFormat, count: int) -> None:
    calls = [call(1, a='"}x'), call(2, "g", b=[1, {}])][:count]
    reader = ToolReader(form, {"f": TEXT, "g": TEXT})
    assert reader.push(form.written(calls)).text + reader.end().text == ""
    told = [(one.name, one.arguments) for one in reader.calls]
    assert told == [("f", '{"a": "\\"}x"}'), ("g", '{"b": [1, {}]}')][:count]


async def test_a_system_message_goes_to_the_user_where_it_would_be_refused_or_lost() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    found = await prompt(MISTRAL, [system, *USER])
    assert "[INST]Be brief.\n\nHow is the weather?[/INST]" in found
    deaf = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    chat, _ = chats(deaf, said("a"))
    _, found = await chat.render(ChatAsk([system, *USER]))
    assert "user\nBe brief.\n\nHow is the weather?<|im_end|>" in found


FIRST_ONLY = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}",
)
"""As Qwen 3.5's."""


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (MISTRAL, "<s>[INST]A\n\nB\n\nC[/INST]"),
        (FIRST_ONLY, "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nC<"),
        (CHATML, "<|im_start|>system\nA<|im_end|>\n<|im_start|>system\nB<|im_end|>\n"),
    ],
)
async def test_several_system_messages_are_as_many_as_the_template_takes(
    template: str, begins: str
) -> None:
    said_by = (("system", "A"), ("developer", "B"), ("user", "C"))
    messages = [{"role": role, "content": text} for role, text in said_by]
    chat, _ = chats(template, said("a"))
    assert (await chat.render(ChatAsk(messages)))[1].startswith(begins)


async def test_parts_come_as_they_are_where_they_are_taken() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    typed = "{% for p in messages[0].content %}({{ p.type }} {{ p.text }}){% endfor %}"
    chat, _ = chats(typed, said("a"))
    assert (await chat.render(ChatAsk([{"role": "user", "content": parts}])))[1] == (
        "(text a)(text b)"
    )
    chat, _ = chats(CHATML, said("a"))
    _, found = await chat.render(ChatAsk([{"role": "user", "content": parts}]))
    assert "user\nab<|im_end|>" in found


def test_messages_are_brought_into_one_shape() -> None:
    (developer, function, empty) = laid_open(
        [
            {"role": "developer", "content": "a"},
            {"role": "function", "name": "f", "content": "b"},
            {"role": "assistant", "content": None, "tool_calls": []},
        ]
    )
    assert developer == {"role": "system", "content": "a"}
    assert function == {"role": "tool", "name": "f", "content": "b"}
    assert empty == {"role": "assistant", "content": ""}
    (asked, answered) = laid_open(
        [
            {"role": "assistant", "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": ""}}
            ]},
            {"role": "tool", "tool_call_id": "c", "content": "x"},
        ]
    )  # fmt: skip
    assert asked["tool_calls"][0]["function"]["arguments"] == {}
    assert asked["tool_calls"][0]["type"] == "function"
    assert answered["name"] == "f"


def test_arguments_are_text_where_a_template_wants_them_so() -> None:
    wants_text = (
        "{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}{{ tools | tojson }}"
    )
    template = ChatTemplate(wants_text, "", "")
    shown = for_template(laid_open(TWO), template, FORMS["hermes"], native=True)
    assert shown[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("sign", "name"),
    [
        ("<tool_call>{function-name}<arg_key>", "json"),
        ('<|start_header_id|> {"name": function name, "parameters": ...}', "llama3"),
        ("<|start_header_id|> <tool_call>", "hermes"),
        ("<|start_header_id|>", "json"),
    ],
)
def test_formats_that_look_alike(sign: str, name: str) -> None:
    assert format_of(sign).name == name
