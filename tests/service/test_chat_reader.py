"""Tool calls told from text, in every format, whatever pieces the answer comes in."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from router.text.tools.formats import FORMATS, PLAIN, ToolFormat, format_of
from router.text.tools.reader import ToolReader
from router.text.tools.scan import DEPTH_MAX, ObjectScanner

FORMS = {form.name: form for form in (*FORMATS, PLAIN)}
HERMES, MISTRAL, LLAMA = FORMS["hermes"], FORMS["mistral"], FORMS["llama3"]
TAGGED, TAGS = FORMS["mistral-tagged"], FORMS["qwen-tags"]
NAMES: dict[str, dict[str, Any]] = {
    "f": {},
    "get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
Read = tuple[str, list[tuple[str, str]], bool]


def cut(text: str, at: Sequence[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


def read(form: ToolFormat, *pieces: str, **options: Any) -> Read:
    """Text, calls as name and arguments, and whether one is incomplete."""
    reader = ToolReader(form, NAMES, **options)
    text, calls = "", dict[int, list[str]]()
    for said in [*map(reader.push, pieces), reader.end()]:
        text += said.text
        for delta in said.calls:
            if delta.id is not None:
                assert delta.name is not None
                calls[delta.index] = [delta.name, ""]
            calls[delta.index][1] += delta.arguments
    assert list(calls) == list(range(len(calls)))
    found = [(name, arguments) for name, arguments in calls.values()]
    assert found == [(call.name, call.arguments) for call in reader.calls]
    return text, found, reader.broken


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "x}\\""]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, "x}\\""]}'

WHOLE: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "No call.\n Two lines ", "No call.\n Two lines ", []),
    (HERMES, f"Let me see.\n{CALL}", "Let me see.", [("f", ARGUMENTS)]),
    (HERMES, f"\n\n{CALL}\n{CALL}\n", "", [("f", ARGUMENTS)] * 2),
    (HERMES, f"{CALL}\n\nThere.", "There.", [("f", ARGUMENTS)]),
    (HERMES, f"a\n{CALL}\n\nb", "a\n\nb", [("f", ARGUMENTS)]),
    (HERMES, '<tool_call>[{"name":"f","arguments":{}},\n{"name":"f","arguments":{"b":1}}]'
     '</tool_call>', "", [("f", "{}"), ("f", '{"b":1}')]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
     "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"b\\": 2}"}</tool_call>',
     "", [("f", '{"b": 2}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ok',
     "ok", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}, "why": 2}</tool_call> ok',
     "ok", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "1\n2\t"}}</tool_call>',
     "", [("f", '{"a": "1\\n2\\t"}')]),
    (MISTRAL, 'Hm.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, '
     '{"name": "f", "arguments": {}}]', "Hm.", [("f", '{"a": 1}'), ("f", "{}")]),
    (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}]', "", [("f", "{}")]),
    (TAGGED, 'Hm.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"b": {}}',
     "Hm.", [("f", '{"a": 1}'), ("get_weather", '{"b": {}}')]),
    (TAGGED, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (TAGGED, '[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 2}}',
     "", [("f", "{}"), ("f", '{"b": 2}')]),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (PLAIN, 'Sure:\n{"name": "f", "arguments": {"a": 1}}', "Sure:", [("f", '{"a": 1}')]),
    (PLAIN, '[{"name": "f", "arguments": {}},\n {"name": "f"}]', "", [("f", "{}"), ("f", "{}")]),
    (PLAIN, '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
     "", [("f", '{"a": 1}')]),
    (PLAIN, '```json\n{"name": "f", "arguments": {"a": 1}}\n```', "", [("f", '{"a": 1}')]),
    (PLAIN, 'Sure:\n```\n[{"name": "f"}]\n```\nDone.\n```\nx\n```',
     "Sure:\nDone.\n```\nx\n```", [("f", "{}")]),
    (PLAIN, '```json\n{"name": "f"}\n```\n```json\n{"name": "f"}\n```', "", [("f", "{}")] * 2),
    (TAGS, "Hm.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
     'A "b"\n\nC\n</parameter>\n'
     "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=f>\n"
     "</function>\n</tool_call>",
     "Hm.", [("get_weather", '{"city": "A \\"b\\"\\n\\nC", "days": 3}'), ("f", "{}")]),
    (TAGS, "<tool_call><function=f><parameter=a>True</parameter><parameter=b>[1]</parameter>"
     "<parameter=c>NaN</parameter></function></tool_call>So.",
     "So.", [("f", '{"a": true, "b": [1], "c": "NaN"}')]),
    (TAGS, "<tool_call><function=get_weather><parameter=city>\n\n</parameter></function>\n"
     "</tool_call>", "", [("get_weather", '{"city": ""}')]),
    (LLAMA, '```\n{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
]  # fmt: skip

TEXTS: list[tuple[ToolFormat, str]] = [
    (HERMES, 'x <tool_call>{"name": "unknown", "arguments": {}}</tool_call> y'),
    (HERMES, "a < b, a << c, <tool_cal, <tool_callx"),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, "<tool_call>{'name': 'f'}</tool_call>"),
    (HERMES, '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": "no JSON"}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arg'),
    (HERMES, '{"name": "f", "arguments": {}}'),
    (LLAMA, '{"name": "Ann", "parameters": {}}'),
    (LLAMA, '{"a": {"name": "f", "parameters": {}}}'),
    (LLAMA, 'It is {"name": "f", "parameters": {}} that you want.'),
    (LLAMA, "<|python_tag|>print(1)"),
    (PLAIN, "[a link](there)\n[1] and [2]\n{x | x > 1}"),
    (PLAIN, '{"name": "f", "note": 1}'),
    (PLAIN, '```json\n{"a": 1}\n```\n```python\nprint()\n```'),
    (PLAIN, "```json \n\n"),
    (PLAIN, "``` x"),
    (TAGS, "<tool_call><function=g><parameter=a>1</parameter></function></tool_call>"),
    (TAGS, "<tool_call><function=f>{}</function></tool_call>"),
    (TAGS, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
    (MISTRAL, "[TOOL_CALLS] none [1]"),
    (TAGGED, "[TOOL_CALLS]g[ARGS]{}"),
    (TAGGED, "[TOOL_CALLS]f[OTHER]{}"),
]


@pytest.mark.parametrize(("form", "text", "plain", "calls"), WHOLE)
def test_calls_and_text(
    form: ToolFormat, text: str, plain: str, calls: list[tuple[str, str]]
) -> None:
    assert read(form, text) == (plain, calls, False)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(("form", "text"), TEXTS)
def test_what_is_no_call_is_text_to_the_letter(form: ToolFormat, text: str) -> None:
    assert read(form, text) == (text, [], False)


@pytest.mark.parametrize(("form", "text"), [row[:2] for row in WHOLE] + TEXTS)
@examples(max_examples=20)
@given(at=st.lists(st.integers(0, 200), max_size=12))
def test_pieces_make_no_difference(form: ToolFormat, text: str, at: list[int]) -> None:
    assert read(form, *cut(text, at)) == read(form, text) == read(form, *text)


ATOMS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "{",
     "}", "[", "]", '"name"', ":", '"f"', '"arguments"', '"parameters"', ",", ";", " ", "\n", "f",
     "é",
     '{"name": "f", "arguments": {', '{"name": "f", "parameters": {', '"a": 1', "}}", "\\", '"',
     "<tool", "nul", "null", "<function=f>", "<parameter=a>", "</parameter>",
     "<function=get_weather>", "<parameter=city>", "</function>", "```",
     "```json\n", "-1.5e3", " " * 70]
)  # fmt: skip


@given(
    form=st.sampled_from(list(FORMS.values())),
    atoms=st.lists(ATOMS, max_size=30),
    at=st.lists(st.integers(0, 400), max_size=20),
    hidden=st.booleans(),
    limit=st.sampled_from([None, 1]),
)
def test_any_text_in_any_pieces(
    form: ToolFormat, atoms: list[str], at: list[int], hidden: bool, limit: int | None
) -> None:
    text = "".join(atoms)
    options = {"hidden": frozenset(form.markers() if hidden else ()), "limit": limit}
    whole = read(form, text, **options)
    assert read(form, *cut(text, at), **options) == whole
    assert read(form, *text, **options) == whole
    plain, calls, broken = whole
    if not broken:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
    assert limit is None or len(calls) <= limit
    if not calls and not hidden and limit is None:
        assert plain == text
    if hidden:
        special = [mark for mark in form.markers() if mark in plain and mark not in form.closer]
        assert not special or calls


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_arguments_come_through_as_they_are(value: Any) -> None:
    for ascii_only in (True, False):
        arguments = json.dumps({"v": value}, ensure_ascii=ascii_only)
        text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
        assert read(HERMES, *text) == ("", [("f", arguments)], False)


@given(st.text())
def test_text_between_tags_comes_through_as_it_is(value: str) -> None:
    assume("</parameter>" not in value)
    text = (
        f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{value}\n</parameter>\n</function>"
        "\n</tool_call>"
    )
    (said, calls, broken) = read(TAGS, *text)
    assert (said, broken) == ("", False)
    assert json.loads(calls[0][1]) == {"city": value}


@given(st.text(alphabet='{}[]:,"\\ \n-+.0123456789eEtrufalsn', max_size=24))
def test_the_scanner_takes_what_json_takes(text: str) -> None:
    scanner, out = ObjectScanner(), ""
    taken: str | None = ""
    for char in text:
        if scanner.done:
            taken = None
            break
        taken = scanner.feed(char)
        if taken is None:
            break
        out += taken
    try:
        valid = isinstance(json.loads(text, strict=False), dict)
    except ValueError:
        valid = False
    assert (scanner.done and taken is not None) == (valid and not text[-1:].isspace())
    if scanner.done and taken is not None:
        assert json.loads(out) == json.loads(text, strict=False)


def test_arguments_are_passed_on_as_they_come() -> None:
    reader = ToolReader(HERMES, NAMES)
    assert reader.push("Well").text == "Well"
    assert reader.push('<tool_call>{"name": "f", "argu').calls == []
    (first,) = reader.push('ments": {"a": "on').calls
    assert (first.index, first.name, first.arguments) == (0, "f", '{"a": "on')
    (second,) = reader.push("ce upon").calls
    assert (second.id, second.name, second.arguments) == (None, None, "ce upon")
    (last,) = reader.push('"}}').calls
    assert last.arguments == '"}'


def test_arguments_that_break_are_left_as_they_were_and_the_rest_is_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1 oops}}</tool_call>'
    assert read(HERMES, text) == ("oops}}</tool_call>", [("f", '{"a": 1 ')], True)


def test_an_answer_that_is_cut_short_has_the_arguments_so_far() -> None:
    assert read(HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b') == (
        "", [("f", '{"a": "b')], True
    )  # fmt: skip


@pytest.mark.parametrize("end", range(len("<tool_call>")))
def test_the_beginning_of_a_further_call_is_no_text(end: int) -> None:
    text = f"{CALL}\n{'<tool_call>'[:end]}"
    assert read(HERMES, *text) == ("", [("f", ARGUMENTS)], False)


def test_the_beginning_of_a_forced_call_is_no_text() -> None:
    for end in range(CALL.index(": {") + 3):
        assert read(HERMES, *CALL[:end], forced=True) == ("", [], False)
        assert read(HERMES, CALL[:end]) == (CALL[:end], [], False)


@pytest.mark.parametrize("none", ["null", '""', '" "', "{}", '"{}"'])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_arguments_that_are_none_are_an_empty_object(none: str, order: tuple[int, int]) -> None:
    parts = '"name": "f"', f'"arguments": {none}'
    members = ", ".join(parts[number] for number in order)
    call = f"<tool_call>{{{members}}}</tool_call>"
    for pieces in ([call], list(call)):
        assert read(HERMES, *pieces) == ("", [("f", "{}")], False)


@pytest.mark.parametrize("value", ["nul", "nil", "nullx", "[]", "1", "true"])
def test_arguments_that_are_nothing_known_are_no_call(value: str) -> None:
    call = f'<tool_call>{{"name": "f", "arguments": {value}}}</tool_call>'
    assert read(HERMES, call) == (call, [], False)


OPTIONAL = [
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"oneOf": [{"$ref": "#/$defs/Code"}, {"const": None}], "default": None},
    {"type": ["string", "null"]},
    {"enum": ["2024", None]},
    {"allOf": [{"$ref": "#/$defs/Code"}]},
]


@pytest.mark.parametrize("schema", OPTIONAL)
@pytest.mark.parametrize("said", ["2024", "true", "{}", "1e3"])
def test_a_tag_is_text_where_its_schema_has_text_and_not_what_it_looks_like(
    schema: dict[str, Any], said: str
) -> None:
    root = {"properties": {"a": schema}, "$defs": {"Code": {"type": ["string", "null"]}}}
    assert tag(root, said) == json.dumps(said)
    assert tag(root, "None") == tag(root, "null") == "null"
    assert tag(root, '"quoted"') == '"quoted"'


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": ["string", "integer"]},
        {"type": "number"},
        {"$ref": "#/elsewhere"},
        {"$ref": "#/properties/a"},
        {"anyOf": 7, "enum": {}, "allOf": None, "type": "integer"},
        {"anyOf": [{"$ref": "#/properties/a"}] * 50, "allOf": [{"$ref": "#/properties/a"}] * 50},
    ],
)
def test_a_tag_is_json_where_that_may_be(schema: Any) -> None:
    assert tag({"properties": {"a": schema}}, "2024") == "2024"


@pytest.mark.parametrize("properties", [None, {}, {"a": {"enum": 5}}, {"a": {"type": 3}}])
def test_a_tag_needs_no_schema_that_makes_sense(properties: Any) -> None:
    assert tag({"properties": properties}, "[1]") == "[1]"


def tag(schema: dict[str, Any], said: str) -> str:
    """What becomes of one value of a call as tags."""
    reader = ToolReader(TAGS, {"f": schema})
    reader.push(f"<tool_call>\n<function=f>\n<parameter=a>\n{said}\n</parameter>\n</function>")
    (call,) = reader.calls
    value: str = call.arguments.removeprefix('{"a": ').removesuffix("}")
    return value


@pytest.mark.parametrize(
    "given",
    [
        r'{"a": "\ud83d"}',
        r'"{\"a\": \"\ud83d\"}"',
        r'"{\"a\": \"\\ud83d\"}"',
    ],
)
def test_half_of_a_surrogate_pair_is_passed_on_in_ascii(given: str) -> None:
    call = f'<tool_call>{{"name": "f", "arguments": {given}}}</tool_call>'
    _, ((_, arguments),), broken = read(HERMES, call)
    assert arguments == r'{"a": "\ud83d"}'
    assert not broken


def test_nesting_has_a_bound() -> None:
    deep = '{"name": "f", "arguments": ' + '{"a": ' * (DEPTH_MAX + 1)
    text, _, broken = read(PLAIN, deep)
    assert broken
    assert text.startswith("{")


def test_further_calls_are_left_out_where_one_is_allowed() -> None:
    for end in range(len(CALL)):
        text = f"{CALL}\n{CALL[:-end]}" if end else f"{CALL}\n{CALL}"
        assert read(HERMES, text, limit=1) == ("", [("f", ARGUMENTS)], False)


def test_markers_that_are_special_tokens_are_never_shown() -> None:
    hidden = frozenset(LLAMA.markers())
    assert read(LLAMA, "<|python_tag|>print(1)", hidden=hidden) == ("print(1)", [], False)
    hidden = frozenset(TAGGED.markers())
    assert read(TAGGED, "a [ARGS]b[TOOL_CALLS]", hidden=hidden) == ("a b", [], False)


def test_ids_are_unlike_each_other_and_as_the_template_wants_them() -> None:
    reader = ToolReader(HERMES, NAMES)
    reader.push(CALL * 2)
    one, other = reader.calls
    assert one.id.startswith("call_")
    assert one.id != other.id
    reader = ToolReader(MISTRAL, NAMES)
    reader.push('[TOOL_CALLS] [{"name": "f", "arguments": {}}]')
    assert len(reader.calls[0].id) == 9
    assert reader.calls[0].id.isalnum()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "json"),
        ("{{ messages }}", "json"),
        ("<tool_call>", "hermes"),
        ("<tool_call>\n<function=", "json"),
        ("<tool_call>\n<function=f>\n<parameter=a>", "qwen-tags"),
        ("<|python_tag|>", "llama3"),
        ("[TOOL_CALLS]", "mistral"),
        ("[TOOL_CALLS][ARGS]", "mistral-tagged"),
        ("[TOOL_CALLS][CALL_ID][ARGS]", "mistral-numbered"),
    ],
)
def test_the_template_says_the_format(template: str | None, name: str) -> None:
    assert format_of(template).name == name
