"""What templates can do is tried out; and named ones are found wherever models keep them."""

import json
from pathlib import Path
from typing import Any

import pytest

from router.text.template import ChatTemplate
from router.text.tokenizer import Tokenizer
from shards.hf_folder import tokenizer_files
from tests.service.chat_bench import CHATML, HERMES, LLAMA, MISTRAL, tokenizer
from tests.service.fake_service import byte_tokenizer

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}<end_of_turn>\n{% endfor %}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.content %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}"
    "{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + '```json\\n' + c.function.arguments + '```' }}"
    "{% endfor %}{% endfor %}"
)
SMOLLM3 = HERMES.replace("m.tool_calls", "m.nothing")
"""Shows the tools, and not the calls."""
TOOLS_ONLY = HERMES.replace("{% if tools %}", "").replace("\n{% endif %}{% for m in", "{% for m in")
"""Cannot do without tools, as those named tool_use."""
BROKEN = "{% for %}"


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        (CHATML, "system arguments"),
        (HERMES, "parts system tools calls arguments"),
        (LLAMA, "system tools calls arguments"),
        (MISTRAL, "tools calls arguments"),
        (GEMMA, "parts arguments"),
        (DEEPSEEK, "system calls"),
        (SMOLLM3, "parts system tools arguments"),
        (TOOLS_ONLY, "parts system tools calls arguments"),
        (BROKEN, "arguments"),
    ],
)
def test_what_a_template_takes(source: str, taken: str) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    template.try_out()
    kinds = ("parts", "system", "tools", "calls", "arguments")
    assert [kind for kind in kinds if getattr(template, f"takes_{kind}")] == taken.split()


def test_a_template_that_never_ends_is_tried_for_a_moment_only() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert not ChatTemplate(source, None, None).takes_tools


def files(config: dict[str, Any], **more: str) -> dict[str, bytes]:
    vocabulary = byte_tokenizer()._tokenizer.to_str().encode()
    out = {"tokenizer.json": vocabulary, "tokenizer_config.json": json.dumps(config).encode()}
    return out | {name.replace("__", "/") + ".jinja": text.encode() for name, text in more.items()}


LISTED = {
    "chat_template": [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t{{ tools }}"},
        {"name": "broken"},
        "nonsense",
    ]
}


def source(made: Tokenizer, name: str | None, *, tools: bool = False) -> str | None:
    template = made.template(name, tools=tools)
    return None if template is None else template.source


def test_named_templates_of_a_list() -> None:
    made = Tokenizer.from_files(files(LISTED))
    assert source(made, None) == "d"
    assert source(made, "default") == "d"
    assert source(made, None, tools=True) == "t{{ tools }}"
    assert source(made, "tool_use") == "t{{ tools }}"
    assert source(made, "broken") is None


def test_named_templates_of_files() -> None:
    made = Tokenizer.from_files(
        files({}, chat_template="d", additional_chat_templates__tool_use="t{{ tools }}")
    )
    assert source(made, None) == "d"
    assert source(made, None, tools=True) == "t{{ tools }}"


def test_a_template_that_shows_no_tools_is_not_for_them() -> None:
    made = Tokenizer.from_files(
        files({}, chat_template="d", additional_chat_templates__tool_use="t")
    )
    assert source(made, None, tools=True) == "d"
    assert source(made, "tool_use") == "t"


def test_a_template_of_its_own_takes_the_place_of_the_list() -> None:
    made = Tokenizer.from_files(files(LISTED, chat_template="mine"))
    assert source(made, None, tools=True) == "mine"
    assert source(made, "tool_use") is None


def test_without_any_template() -> None:
    made = Tokenizer.from_files(files({}))
    assert made.template(None) is None
    assert made.template("default", tools=True) is None


def test_a_template_that_is_no_text_is_named() -> None:
    given = files({}) | {"additional_chat_templates/rag.jinja": b"\xff"}
    with pytest.raises(ValueError, match=r"additional_chat_templates/rag\.jinja is not UTF-8"):
        Tokenizer.from_files(given)


def test_a_folder_gives_all_its_templates(tmp_path: Path) -> None:
    for name, data in files(
        {}, chat_template="d", additional_chat_templates__tool_use="t{{ tools }}"
    ).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    made = Tokenizer.from_files(tokenizer_files(tmp_path))
    assert source(made, None, tools=True) == "t{{ tools }}"


def test_markers_are_tokens_where_the_vocabulary_has_them() -> None:
    made = tokenizer(HERMES)
    assert made.token_id("[TOOL_CALLS]") in made.special_ids
    assert made.token_id("<tool_call>") not in made.special_ids
    assert made.token_id("<tool_call>") is not None
    assert made.token_id("a") is None
    assert made.token_id("no such") is None
