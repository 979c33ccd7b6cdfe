"""Members behind a call's name and arguments that a call does not need: they are passed over."""

import pytest

from router.text.tools.formats import ToolFormat
from tests.service.test_chat_reader import HERMES, LLAMA, MISTRAL, read

ONE = [("f", "{}")]
PASSED_OVER: list[tuple[ToolFormat, str, list[tuple[str, str]]]] = [
    (LLAMA, '{"name": "f", "parameters": {}, "id": 3}', ONE),
    (LLAMA, '{"name": "f", "parameters": {}, "type": null}', ONE),
    (LLAMA, '{"name": "f", "parameters": {}, "id": "x", "na": {"}": ["{", null]}}', ONE),
    (LLAMA, '{"parameters": {}, "name": "f", "a\\"}": "\\"}", "quite a long one": -1.5e3 }', ONE),
    (LLAMA, '{"function": {"name": "f", "arguments": {}, "strict": true}, "type": "x"}', ONE),
    (LLAMA, '{"function": {"name": "f", "arguments": {}}, "strict": [true, {}]}', ONE),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {}, "why": "\n"}\n</tool_call>', ONE),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}, "x": {}}, '
     '{"name": "f", "arguments": {"a": 1}, "id": null}]', [*ONE, ("f", '{"a": 1}')]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "calls"), PASSED_OVER)
def test_they_are_no_text(form: ToolFormat, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(form, text) == ("", calls, False)
    assert read(form, *text) == ("", calls, False)


@pytest.mark.parametrize("rest", [', "why": 2 3}', ', "why": }', ", why: 2}", ', "id": tru}'])
def test_what_is_no_json_is_text_behind_the_call(rest: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{}}{rest}</tool_call>'
    assert read(HERMES, text) == read(HERMES, *text)
    shown, calls, _ = read(HERMES, text)
    assert (shown, calls) == (f"{rest}</tool_call>", ONE)


@pytest.mark.parametrize("text", ['{"id": 3, "name": "f", "parameters": {}}', '{"why": 1}'])
def test_before_a_call_is_sure_they_make_it_none(text: str) -> None:
    assert read(LLAMA, text) == (text, [], False)
