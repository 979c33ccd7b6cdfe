"""Stop strings in a stream are found as in the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.stop import StopMatcher


def searched(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The plain search: the stop string that is complete first, the longest of several."""
    for end in range(len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            stop = max(here, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(tuple(stops), include)
    taken = []
    for piece in pieces:
        taken.append(matcher.push(piece))
        if matcher.matched is not None:
            return "".join(taken), matcher.matched
    return "".join(taken) + matcher.flush(), None


LETTERS = st.text("abé👍", max_size=8)


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(LETTERS, max_size=12),
    stops=st.lists(LETTERS.filter(bool), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_any_pieces_give_what_a_search_of_the_whole_gives(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    assert streamed(pieces, stops, include) == searched("".join(pieces), stops, include)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(LETTERS, max_size=12), stops=st.lists(LETTERS.filter(bool), min_size=1))
def test_no_more_is_held_back_than_could_start_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    seen = given_out = ""
    for piece in pieces:
        given_out += matcher.push(piece)
        if matcher.matched is not None:
            return
        seen += piece
        held = seen[len(given_out) :]
        assert seen.startswith(given_out)
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["Hello", " wor", "ld", "!"], "Hello "),
        (["Hello world!"], "Hello "),
        (["w", "o", "r", "l", "d"], ""),
        (["wor", "wor", "ld"], "wor"),
    ],
)
def test_a_stop_across_borders_is_cut(pieces: list[str], text: str) -> None:
    assert streamed(pieces, ["world"], include=False) == (text, "world")
    assert streamed(pieces, ["world"], include=True) == (text + "world", "world")


def test_text_that_only_looked_like_a_stop_comes_later() -> None:
    matcher = StopMatcher(("</end>",))
    assert matcher.push("a</e") == "a"
    assert matcher.push("m>") == "</em>"
    assert matcher.push("</en") == ""
    assert matcher.flush() == "</en"
    assert matcher.matched is None


def test_the_first_to_be_complete_wins() -> None:
    assert streamed(["abcd"], ["abcd", "bc"], include=False) == ("a", "bc")
    assert streamed(["abc"], ["bc", "abc"], include=False) == ("", "abc")


def test_what_is_held_back_is_bounded_by_the_stop_string() -> None:
    stop = "a" * 1000 + "b"
    matcher = StopMatcher((stop,))
    out = sum(len(matcher.push("a" * 500)) for _ in range(20))
    assert out == 9000
    assert matcher.push("b") == ""
    assert matcher.matched == stop
