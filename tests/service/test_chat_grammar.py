"""What the grammars of forced calls let through, by the compiler that the workers use."""

import json
from typing import Any

import llguidance
import pytest

from router.ask import Constraint
from router.errors import Fault, RequestError
from router.text import constraints
from router.text.reasoning import DEFAULT, THOUGHTS
from router.text.tools.formats import FORMATS, PLAIN
from router.text.tools.grammar import CALLS_MAX, GrammarWriter, Thinking
from router.text.tools.reader import ToolReader
from tests.service.chat_bench import CHATML, TOOLS, tokenizer, tool

FORMS = {form.name: form for form in (*FORMATS, PLAIN)}
TOKENIZER = tokenizer(CHATML)
BYTES = TOKENIZER._tokenizer
COMPILER = llguidance.LLTokenizer(
    BYTES.to_str(), eos_token=BYTES.token_to_id("<|im_end|>"), n_vocab=BYTES.get_vocab_size()
)
ONE = '{"name": "get_weather", "%s": {"city": "a"}}'
OTHER = '{"name": "now", "%s": {}}'
HERMES = "<tool_call>\n%s\n</tool_call>"
ONE_A, OTHER_A = ONE % "arguments", OTHER % "arguments"

ACCEPTED = {
    "hermes": [HERMES % ONE_A, f"{HERMES % OTHER_A}\n{HERMES % ONE_A}"],
    "json": [ONE_A, f"[{OTHER_A}, {ONE_A}]"],
    "qwen-tags": [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</parameter>\n</function>\n"
        "</tool_call>",
        "\n".join(["<tool_call>\n<function=now>\n</function>\n</tool_call>"] * 2),
    ],
    "llama3": [ONE % "parameters", OTHER % "parameters"],
    "mistral": [f"[TOOL_CALLS] [{ONE_A}]", f"[TOOL_CALLS][{OTHER_A}, {ONE_A}]"],
    "mistral-tagged": [
        '[TOOL_CALLS]get_weather[ARGS]{"city": "a"}',
        '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{"city": "b"}',
    ],
    "mistral-numbered": [
        '[TOOL_CALLS]get_weather[CALL_ID]abcdefgh1[ARGS]{"city": "a"}',
        "[TOOL_CALLS]now[CALL_ID]abcdefgh1[ARGS]{}" * 2,
    ],
}
THINKING = [Thinking(row, opened) for row in (DEFAULT, THOUGHTS[2]) for opened in (True, False)]


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether this is a whole text of the grammar, token by token."""
    matcher = llguidance.LLMatcher(COMPILER, constraint.text)
    assert not matcher.get_error(), matcher.get_error()
    ids = BYTES.encode(text).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def calls(form: str, *, several: bool = True, thinking: Thinking | None = None) -> Constraint:
    writer = GrammarWriter(FORMS[form], TOKENIZER.token_id)
    return writer.calls(TOOLS, "tool_choice", several=several, thinking=thinking)


@pytest.mark.parametrize("form", ["hermes", "json", "llama3"])
def test_arguments_are_an_object_also_if_the_schema_does_not_say_so(form: str) -> None:
    untyped = tool("f", {"properties": {"a": {"type": "integer"}}})
    writer = GrammarWriter(FORMS[form], TOKENIZER.token_id)
    made = writer.calls([untyped], "tool_choice", several=False, thinking=None)
    call = f'{{"name": "f", "{FORMS[form].key}": %s}}'
    whole = HERMES % call if form == "hermes" else call
    assert accepts(made, whole % '{"a": 1}')
    assert not accepts(made, whole % '"a"')


@pytest.mark.parametrize("form", ACCEPTED)
def test_calls_in_the_models_own_format_and_nothing_else(form: str) -> None:
    made = calls(form)
    assert made.field == "tool_choice"
    for text in ACCEPTED[form]:
        assert accepts(made, text)
        reader = ToolReader(FORMS[form], {one.name: one.parameters for one in TOOLS})
        assert reader.push(text).text + reader.end().text == ""
        assert reader.calls
        assert not reader.broken
        wrong = text.replace("get_weather", "get_time").replace("now", "get_time")
        for bad in (text[:-1], f"Well: {text}", f"{text} So.", wrong, text.replace('"a"', "1")):
            assert bad == text or not accepts(made, bad)


@pytest.mark.parametrize("form", ACCEPTED)
def test_one_call_where_one_is_wanted(form: str) -> None:
    made = calls(form, several=False)
    one, two = ACCEPTED[form]
    assert accepts(made, one)
    assert accepts(made, two) == (form == "llama3")  # which writes one call at a time anyway


def test_calls_have_a_bound() -> None:
    made, one = calls("hermes"), HERMES % OTHER_A
    assert accepts(made, "\n".join([one] * CALLS_MAX))
    assert not accepts(made, "\n".join([one] * (CALLS_MAX + 1)))


@pytest.mark.parametrize("thinking", THINKING)
@pytest.mark.parametrize("form", ACCEPTED)
def test_thoughts_go_before(form: str, thinking: Thinking) -> None:
    made, text = calls(form, thinking=thinking), ACCEPTED[form][0]
    opener = "" if thinking.opened else thinking.markers.opener
    assert accepts(made, f"{opener}Hm {{1}}\n{thinking.markers.closer}\n\n{text}")
    assert accepts(made, text) != thinking.opened
    assert not accepts(made, f"{opener}Hm {{1}}\n{thinking.markers.closer}\n\nNo.")


def test_references_within_a_schema_stay_what_they_are() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/number"}},
        "required": ["n"],
        "$defs": {"number": {"type": "integer"}},
    }
    writer = GrammarWriter(FORMS["hermes"], TOKENIZER.token_id)
    made = writer.calls([tool("f", schema)], "tool_choice", several=False, thinking=None)
    call = '<tool_call>\n{"name": "f", "arguments": {"n": %s}}\n</tool_call>'
    assert accepts(made, call % "3")
    assert not accepts(made, call % '"3"')


EMPTY = {"hermes": '{"name": "f", "arguments": {}}', "qwen-tags": "<function=f>\n</function>"}


@pytest.mark.parametrize("form", EMPTY)
def test_null_for_what_a_schema_has_none_of(form: str) -> None:
    """As clients in Go write it."""
    writer = GrammarWriter(FORMS[form], TOKENIZER.token_id)
    schema = {"type": "object", "properties": None, "required": None}
    made = writer.calls([tool("f", schema)], "tool_choice", several=False, thinking=None)
    assert accepts(made, f"<tool_call>\n{EMPTY[form]}\n</tool_call>")


TRIP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "minLength": 2, "maxLength": 5},
        "days": {"type": "integer"},
        "by": {"enum": ["car", "train"]},
        "stops": {"$ref": "#/$defs/stops"},
    },
    "required": ["to", "days"],
    "$defs": {"stops": {"type": "array", "items": {"type": "boolean"}}},
}


def test_tags_keep_to_the_schema() -> None:
    writer = GrammarWriter(FORMS["qwen-tags"], TOKENIZER.token_id)
    made = writer.calls([tool("f", TRIP)], "tool_choice", several=False, thinking=None)

    def call(**values: str) -> str:
        parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
        return f"<tool_call>\n<function=f>\n{''.join(parts)}</function>\n</tool_call>"

    assert accepts(made, call(to="a\nb", days="3"))
    assert accepts(made, call(to="ab", days="3", by="car", stops="[true]"))
    for bad in (
        {"to": "ab"},
        {"to": "abcdef", "days": "3"},
        {"to": "a", "days": "3"},
        {"to": "ab", "days": "three"},
        {"to": "ab", "days": "3", "by": "bus"},
        {"to": "ab", "days": "3", "stops": "[1]"},
    ):
        assert not accepts(made, call(**bad))


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "x+"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1},
    ],
)
def test_what_tags_cannot_keep_is_refused_by_name(parameters: dict[str, Any]) -> None:
    writer = GrammarWriter(FORMS["qwen-tags"], TOKENIZER.token_id)
    with pytest.raises(RequestError, match=r"`(pattern|minProperties)`") as caught:
        writer.calls([tool("f", parameters)], "tool_choice", several=False, thinking=None)
    assert (caught.value.fault, caught.value.field) == (Fault.UNSUPPORTED, "tools")


SCHEMA = {
    "type": "object",
    "properties": {"z": {"$ref": "#/$defs/q"}},
    "required": ["z"],
    "$defs": {"q": {"type": "integer"}},
}
WANTED = [
    (constraints.json_schema(SCHEMA, "response_format"), '{"z":1}', '{"z":"1"}'),
    (constraints.regex(r"a/b+\/\n", "guided_regex"), "a/bb/\n", "a/\n"),
    (constraints.choice(["yes", "no"], "guided_choice"), "yes", "maybe"),
]


@pytest.mark.parametrize(("wanted", "good", "bad"), WANTED)
@pytest.mark.parametrize("thinking", THINKING)
def test_an_answer_is_constrained_behind_its_thoughts(
    wanted: Constraint, good: str, bad: str, thinking: Thinking
) -> None:
    writer = GrammarWriter(PLAIN, TOKENIZER.token_id)
    made = writer.answer(wanted, (), several=True, thinking=thinking)
    assert made.field == wanted.field
    before = "Hm. " + thinking.markers.closer
    before = before if thinking.opened else thinking.markers.opener + before
    assert accepts(made, before + good)
    assert accepts(made, f"{before}\n\n{good}")
    assert not accepts(made, before + bad)


@pytest.mark.parametrize(("wanted", "good", "bad"), WANTED)
@pytest.mark.parametrize("form", ACCEPTED)
def test_an_answer_or_calls(form: str, wanted: Constraint, good: str, bad: str) -> None:
    writer = GrammarWriter(FORMS[form], TOKENIZER.token_id)
    if form == "json" and wanted.field != "response_format":
        # Without a marker only an object is told from the list of calls.
        with pytest.raises(RequestError) as caught:
            writer.answer(wanted, TOOLS, several=True, thinking=None)
        assert (caught.value.fault, caught.value.field) == (Fault.UNSUPPORTED, wanted.field)
        return
    made = writer.answer(wanted, TOOLS, several=True, thinking=None)
    assert accepts(made, good)
    assert not accepts(made, bad)
    marked = {"json": f"[{ACCEPTED['json'][0]}]", "llama3": f"<|python_tag|>{ONE % 'parameters'}"}
    assert accepts(made, marked.get(form, ACCEPTED[form][0]))


def test_an_answer_alone_needs_no_other_grammar() -> None:
    wanted = constraints.json_schema(SCHEMA, "response_format")
    writer = GrammarWriter(PLAIN, TOKENIZER.token_id)
    assert writer.answer(wanted, (), several=True, thinking=None) is wanted


@pytest.mark.parametrize("text", ['root ::= "a"', 'start: "a" start | "b"', 'begin: "a"'])
def test_a_grammar_that_cannot_be_part_of_another_is_refused(text: str) -> None:
    wanted = constraints.grammar(text, "guided_grammar")
    writer = GrammarWriter(PLAIN, TOKENIZER.token_id)
    with pytest.raises(RequestError) as caught:
        writer.answer(wanted, (), several=True, thinking=THINKING[0])
    assert caught.value.field == "guided_grammar"


def test_names_are_quoted() -> None:
    writer = GrammarWriter(PLAIN, TOKENIZER.token_id)
    made = writer.calls([tool("größe.a-b")], "tool_choice", several=False, thinking=None)
    assert accepts(
        made, json.dumps({"name": "größe.a-b", "arguments": {"city": ""}}, ensure_ascii=False)
    )
