"""Chat templates: the dialect that models are written in, and what a bad one cannot do."""

import time
from typing import Any

import pytest

from router.errors import Fault, RequestError
from router.text.template import SOURCE_CHARS_MAX, ChatTemplate

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello <b>&'\""}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    template = ChatTemplate(source, "<s>", None)
    return template.render(HELLO if messages is None else messages, variables)


def refused(source: str, **variables: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        render(source, **variables)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_conversation_is_laid_out() -> None:
    asked = "<|im_start|>user\nHello <b>&'\"<|im_end|>\n"
    assert render(CHATML) == asked + "<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == asked


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ eos_token is defined }}", "<s>||False"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% generation %}{% set x = 'y' %}{{ x }}{% endgeneration %}{{ x }}", "yy"),
        ("{% set n = namespace() %}{% for m in 'ab' %}{% set n.v = m %}{% endfor %}{{ n.v }}", "b"),
        ("{% for i in range(6) if i % 2 %}{{ loop.index }}:{{ i }} {% endfor %}", "1:1 2:3 3:5 "),
        ("{% for t in [[[], []]] recursive %}({{ loop(t) }}){% endfor %}", "(()())"),
        ("{% for x in 'ab' %}{{ loop.previtem }}{{ loop.revindex }}{% endfor %}", "2a1"),
        ("{% for x in 'abc' %}{{ loop.index }}{{ loop.last }}/{{ loop.length }} {% endfor %}",
         "1False/3 2False/3 3True/3 "),
        ("{{ messages[0].content.split(' ')[0] }}{{ messages[::-1] | length }}", "Hello1"),
        ("{{ 'x' * 3 }}{{ 2 ** 8 }}", "xxx256"),
        ("{% for k, v in messages[0].items() %}{{ k }},{% endfor %}", "role,content,"),
        ("{% for x in missing %}{{ x }}{% else %}none{% endfor %}", "none"),
    ],
)  # fmt: skip
def test_the_dialect(source: str, text: str) -> None:
    assert render(source) == text


def test_the_year_is_this_year() -> None:
    before = time.strftime("%Y")
    assert before <= render("{{ strftime_now('%Y') }}") <= time.strftime("%Y")


def test_the_models_own_switches_reach_it() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ tools[0].name }}", tools=[{"name": "add"}]) == "add"


def test_special_tokens_and_messages_cannot_be_replaced() -> None:
    error = refused("{{ bos_token }}", bos_token="x")
    assert (error.fault, error.field) == (Fault.VALIDATION, "bos_token")


def test_what_the_template_objects_to_is_said_in_its_words() -> None:
    error = refused("{{ raise_exception('Only user\n and assistant roles') }}")
    assert error.fault is Fault.TEMPLATE
    assert error.message == "Only user and assistant roles"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for x in %}", "line 1"),
        ("\n\n{% endif %}", "line 3"),
        ("{{ messages[5].content.x }}", "no element 5"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nests too deeply"),
        ("x" * (SOURCE_CHARS_MAX + 1), "longer than"),
    ],
)
def test_a_broken_template_is_one_line_of_error(source: str, words: str) -> None:
    error = refused(source)
    assert error.fault is Fault.TEMPLATE
    assert words in error.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum(n=100) }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    try:
        said = ChatTemplate(source, None, None).render(messages)
    except RequestError as error:
        assert error.fault is Fault.TEMPLATE  # noqa: PT017
    else:
        assert said == ""
    assert messages == [{"role": "user", "content": "x"}]


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
END = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOP + END,
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}" + END,
        "{% macro f() %}" + LOOP + "x" + END + "{% endmacro %}{{ f() }}",
        LOOP + "{{ a.bit_length() and '' }}" + END,
    ],
)
def test_an_endless_template_is_stopped(source: str) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match="too long") as caught:
        ChatTemplate(source, None, None).render(HELLO, seconds_max=0.05)
    assert caught.value.fault is Fault.TEMPLATE
    assert time.monotonic() - began < 5


def test_the_output_is_bounded() -> None:
    template = ChatTemplate("{% for a in range(1000) %}{{ 'x' * 100 }}{% endfor %}", None, None)
    assert len(template.render(HELLO)) == 100_000
    with pytest.raises(RequestError, match="more than 50000 characters"):
        template.render(HELLO, output_chars_max=50_000)


@pytest.mark.parametrize(
    "source", ["{{ 'x' * 999999999999 }}", "{{ 999999999 * [1] }}", "{{ 9 ** 9 ** 9 }}"]
)
def test_one_expression_cannot_fill_the_memory(source: str) -> None:
    assert refused(source).fault is Fault.TEMPLATE


DOUBLED = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(24) %%}%s{%% endfor %%}{{ ns.x|length }}"
)
TEXT = "'aaaaaaaa'"


@pytest.mark.parametrize(
    "source",
    [
        DOUBLED % (TEXT, "{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLED % (TEXT, "{% set ns.x = ns.x + ns.x %}"),
        DOUBLED % (TEXT, "{% set ns.x = [ns.x, ns.x]|join %}"),
        DOUBLED % (TEXT, "{% set ns.x = ns.x.replace('a', 'aa') %}"),
        DOUBLED % (TEXT, "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        DOUBLED % (TEXT, "{% macro f() %}{{ ns.x }}{{ ns.x }}{% endmacro %}{% set ns.x = f() %}"),
        DOUBLED % ("[1]", "{% set ns.x = ns.x + ns.x %}"),
        DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
        DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x|tojson }}",
        DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ '' ~ ns.x }}",
        DOUBLED % ("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ '%s' % ns.x }}",
        DOUBLED % ("3", "{% set ns.x = ns.x * ns.x %}"),
        "{{ '%099999999d' % 1 }}",
        "{{ '%099999999d'|format(1) }}",
        "{{ '{:>99999999}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=99999999) }}",
        "{{ ('{0}' * 9999).format('a' * 9999) }}",
        "{{ ('%s' * 9999) % (('a' * 9999,) * 9999) }}",
        "{{ 'x'|center(99999999) }}",
        "{{ 'x'.ljust(99999999) }}",
        "{{ ('\t' * 9999).expandtabs(9999) }}",
        "{{ ('a\n' * 9999)|indent(9999) }}",
        "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999)|join('b' * 9999) }}",
        "{{ ('b' * 9999).join('a' * 9999) }}",
        "{{ ('b' * 9999).join(range(99999)|map('string')) }}",
        "{{ (['a' * 9999] * 9999)|select|join }}",
        "{{ range(99999)|map('center', 99999)|list }}",
        "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
        "{{ messages|tojson(indent=99999999) }}",
        "{{ [1]|slice(99999999)|list }}",
        "{{ [1]|batch(99999999, 0)|list }}",
        "{{ ([[1] * 9999] * 9999)|sum(start=[]) }}",
        "{{ ('<!-- -->' * 99999)|striptags }}",
    ],
)
def test_nothing_else_can_fill_the_memory_or_take_for_ever(source: str) -> None:
    began = time.monotonic()
    assert refused(source).fault is Fault.TEMPLATE
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ [2] ~ none }}", "a1[2]None"),
        ("{{ ['a', 1]|join('-') }}{{ ', '.join(['a', 'b']|map('upper')) }}", "a-1A, B"),
        ("{{ messages|map(attribute='role')|join }}", "user"),
        ("{{ '%s is %d' % ('a', 2) }}{{ '%s'|format('x') }}{{ '{:>3}'.format(7) }}", "a is 2x  7"),
        ("{{ 'a\nb'|indent(2, true) }}{{ [1, 2]|sum }}{{ [3, 1]|sort }}", "  a\n  b3[1, 3]"),
        (
            "{{ 'a-b'.replace('-', '+') }}{{ 'a'|replace('a', 'b') }}{{ 7 % 4 }}{{ 2 + 3 }}",
            "a+bb35",
        ),
        ("{{ {'a': [1]}|tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{{ 3 * 'ab' }}{{ [1] * 2 }}{{ [1] + [2] }}{{ ' x '|trim }}", "ababab[1, 1][1, 2]x"),
    ],
)
def test_what_is_small_is_as_in_jinja(source: str, text: str) -> None:
    assert ChatTemplate(source, None, None).render(HELLO) == text


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "a b\n" * 250} for _ in range(400)]
    source = (
        "{% set ns = namespace(x='') %}{% for m in messages %}"
        "{% set ns.x = ns.x ~ m.role + ': ' + m.content|trim ~ m.content.replace('a', 'b') %}"
        "{% endfor %}{{ ns.x }}"
    )
    assert len(ChatTemplate(source, None, None).render(messages)) == 400 * (6 + 999 + 1000)


def test_more_than_the_sandbox_range_is_refused() -> None:
    assert "Range too big" in refused("{% for a in range(10000000) %}{% endfor %}").message
