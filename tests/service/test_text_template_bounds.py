"""Chat templates that take long or make much in ways in which no loop and no text is to be seen."""

import time
from pathlib import Path

import pytest

from router.errors import Fault, RequestError
from router.text.template import ChatTemplate

HELLO = [{"role": "user", "content": "Hello"}]
# Each holds the one before twice: little memory, and 2**25 parts for whoever goes through them.
TREES = (
    "{% set ns = namespace(a=EMPTY, b=EMPTY) %}"
    "{% for i in range(24) %}{% set ns.a = TWICE_A %}{% set ns.b = TWICE_B %}{% endfor %}"
)
LISTS = TREES.replace("EMPTY", "[]").replace("TWICE_A", "[ns.a, ns.a]")
LISTS = LISTS.replace("TWICE_B", "[ns.b, ns.b]")
TUPLES = TREES.replace("EMPTY", "()").replace("TWICE_A", "(ns.a, ns.a)")
TUPLES = TUPLES.replace("TWICE_B", "(ns.b, ns.b)")


def render(source: str) -> str:
    return ChatTemplate(source, None, None).render(HELLO)


def refused(source: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.fault is Fault.TEMPLATE
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "source",
    [
        "{{ ns.a == ns.b }}",
        "{{ ns.a != ns.b }}",
        "{% if ns.a < ns.b %}{% endif %}",
        "{{ ns.a <= ns.b <= ns.a }}",
        "{{ ns.a in [ns.b] }}",
        "{{ ns.a not in [ns.b] }}",
        "{{ ns.a in {1: ns.b}.values() }}",
        "{{ ns.a in [ns.b]|map('list') }}",
        "{{ {1: ns.a}.items() == {1: ns.b}.items() }}",
        "{{ ns.a is eq(ns.b) }}",
        "{{ ns.a is in([ns.b]) }}",
        "{{ [ns.a]|select('equalto', ns.b)|list|length }}",
        "{{ [ns.a, ns.b]|sort|length }}",
        "{{ [ns.a, ns.b]|min|length }}",
        "{{ [{'x': ns.a}, {'x': ns.b}]|groupby('x')|length }}",
        "{{ [ns.b].index(ns.a) }}",
        "{{ [ns.b].count(ns.a) }}",
        "{% for x in [ns.a, ns.b] %}{{ loop.changed(x) }}{% endfor %}",
    ],
)
def test_what_is_compared_is_measured(source: str) -> None:
    assert "too much" in refused(LISTS + source).message


@pytest.mark.parametrize(
    "source",
    ["{{ {ns.a: 1}|length }}", "{{ {}[ns.a] }}", "{{ {}.get(ns.a) }}", "{{ [ns.a]|unique|list }}"],
)
def test_what_is_hashed_is_measured(source: str) -> None:
    assert "too much" in refused(TUPLES + source).message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{{ 1 < 2 < 3 }}{{ 3 < 2 }}{{ 2 >= 2 }}{{ 2 > 2 }}{{ 2 <= 1 }}",
            "TrueFalseTrueFalseFalse",
        ),
        ("{{ messages[0] == messages[-1] }}{{ messages != [] }}", "TrueTrue"),
        ("{{ 'ell' in 'Hello' }}{{ 'role' in messages[0] }}{{ 'x' not in 'y' }}", "TrueTrueTrue"),
        ("{{ [1] in [[1], 2] }}{{ [3] in [[1], 2]|map('string') }}", "TrueFalse"),
        ("{{ nothing == 1 }}{{ nothing == none }}", "FalseFalse"),
        ("{{ messages[0] is eq(messages[0]) }}{{ 1 is in([1]) }}{{ 4 is lt 3 }}", "TrueTrueFalse"),
        ("{{ 6 is divisibleby 3 }}{{ 7 // 2 }}{{ 7 % 4 }}", "True33"),
        ("{{ {(1, 2): 5}[(1, 2)] }}{{ [3, 1, 2]|sort|join }}", "5123"),
        ("{{ messages|map(attribute='role')|unique|list|length }}", "1"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|length }}", "1"),
    ],
)
def test_comparisons_mean_what_they_say(source: str, said: str) -> None:
    assert render(source) == said


@pytest.mark.parametrize(
    "source",
    [
        "{{ (1).to_bytes(900000000, 'big')|length }}",
        "{{ 'x'.encode().ljust(900000000)|length }}",
        "{{ ('%900000000d'.encode() % 1)|length }}",
        "{{ (1).from_bytes('xxxx'.encode(), 'big') }}",
        "{% set x = ('f' * 90000)|int(0, 16) %}{{ x // 3 }}",
        "{% set x = ('f' * 90000)|int(0, 16) %}{{ x is divisibleby(3) }}",
    ],
)
def test_numbers_and_bytes_are_bounded(source: str) -> None:
    assert refused(source).message.startswith("the chat template ")


def test_what_is_kept_is_bounded() -> None:
    """Each value is small enough, and they would be 800 MB together."""
    source = (
        "{% set ns = namespace(x=[]) %}"
        "{% for i in range(100) %}{% set ns.x = [ns.x, [1] * 1000000] %}{% endfor %}"
    )
    if Path("/proc/self/statm").exists():  # elsewhere the system does not say it, and time is all
        assert "too much" in refused(source).message


def test_what_is_made_again_and_again_is_not() -> None:
    source = "{% for i in range(100) %}{% set x = [1] * 1000000 %}{% endfor %}done"
    assert render(source) == "done"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25,
        "{% if a %}" * 120 + "x" + "{% endif %}" * 120,
    ],
)
def test_what_python_cannot_compile_is_reported_when_it_is_used(source: str) -> None:
    assert refused(source).message == "the chat template nests too deeply"


def test_compiling_ends() -> None:
    """What is constant is computed by the compiler: here a thousand sorts of a long list."""
    began = time.monotonic()
    ChatTemplate("{{ 'a'|center(1000000)" + "|list|sort|join" * 1000 + " }}", None, None)
    assert time.monotonic() - began < 60
