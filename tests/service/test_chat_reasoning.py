"""Thoughts told from answers, whatever pieces they come in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.reasoning import DEFAULT, THOUGHTS, Thoughts, ThoughtSplitter, thoughts_of

CASES = [
    ("Plain.", False, "", "Plain."),
    (" \nPlain.", False, "", " \nPlain."),
    ("<think>\nHm,\n\nyes.\n</think>\n\nYes. ", False, "Hm,\n\nyes.", "Yes. "),
    ("\n<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("Hm.</think>Yes.", True, "Hm.", "Yes."),
    ("\nHm </thin </think", True, "Hm </thin </think", ""),
    ("<think></think>\n\nYes", False, "", "Yes"),
    ("No <think>tags</think>", False, "", "No <think>tags</think>"),
    ("<thi", False, "", "<thi"),
    ("  \n", True, "", ""),
    ("<think>\n", False, "", ""),
    ("a\n\n  b", True, "a\n\n  b", ""),
]


def split(pieces: list[str] | str, opened: bool, markers: Thoughts = DEFAULT) -> tuple[str, str]:
    splitter = ThoughtSplitter(markers, opened)
    parts = [*map(splitter.push, pieces), splitter.end()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(("text", "opened", "thoughts", "answer"), CASES)
def test_thoughts_and_answer(text: str, opened: bool, thoughts: str, answer: str) -> None:
    assert split([text], opened) == (thoughts, answer)
    assert split(text, opened) == (thoughts, answer)


@given(
    atoms=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "é"])
    ),
    at=st.lists(st.integers(0, 200)),
    opened=st.booleans(),
)
def test_pieces_make_no_difference_and_only_space_is_lost(
    atoms: list[str], at: list[int], opened: bool
) -> None:
    text = "".join(atoms)
    borders = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    pieces = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]  # noqa: RUF007
    thoughts, answer = split(pieces, opened)
    assert (thoughts, answer) == split([text], opened) == split(text, opened)
    kept = "".join((thoughts + answer).split())
    whole = "".join(text.split())
    assert kept in (
        whole,
        whole.replace("<think>", "", 1),
        whole.replace("</think>", "", 1),
        whole.replace("<think>", "", 1).replace("</think>", "", 1),
    )


def test_thoughts_come_as_they_are_thought() -> None:
    splitter = ThoughtSplitter(DEFAULT, False)
    assert splitter.push("<think>\nOne") == ("One", "")
    assert splitter.push(" two <") == (" two", "")
    assert splitter.push("b> \n") == (" <b>", "")
    assert splitter.push("</think>\n") == ("", "")
    assert splitter.push("\nYes ") == ("", "Yes ")
    assert splitter.push(" no") == ("", " no")


@pytest.mark.parametrize("markers", THOUGHTS)
def test_every_known_pair_of_markers(markers: Thoughts) -> None:
    text = f"{markers.opener}a{markers.closer}b"
    assert split([text], False, markers) == ("a", "b")
    assert thoughts_of(f"... {markers.closer} ...") is markers
    assert markers.opened_by(f"x{markers.opener}\n")
    assert not markers.opened_by(f"{markers.opener}x")
    assert markers.closed_by(f"{markers.opener}\n\n{markers.closer}\n\n")


def test_a_template_without_thoughts_has_none() -> None:
    assert thoughts_of("{{ messages }}") is None
    assert thoughts_of(None) is None
