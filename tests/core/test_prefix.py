"""The prefix tree: examples, and a comparison with a list of lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.prefix import PrefixTree


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ((1, 2, 3, 4), (4, 10)),
        ((1, 2, 3, 4, 5), (4, 10)),
        ((1, 2, 3, 9), (3, 10)),
        ((1, 2, 7, 8), (4, 20)),
        ((1, 2), (2, 10)),
        ((1,), (1, 10)),
        ((5,), (1, 30)),
        ((6, 1, 2), (0, None)),
        ((), (0, None)),
    ],
)
def test_the_longest_common_start_and_its_first_holder(
    tokens: tuple[int, ...], found: tuple[int, int | None]
) -> None:
    tree = PrefixTree()
    tree.insert(10, (1, 2, 3, 4))
    tree.insert(20, (1, 2, 7, 8))
    tree.insert(30, (5,))
    assert tree.match(tokens) == found


def test_a_holder_that_is_removed_leaves_the_rest() -> None:
    tree = PrefixTree()
    tree.insert(10, (1, 2, 3))
    tree.insert(20, (1, 2, 4))
    tree.remove(10)
    assert 10 not in tree
    assert tree.match((1, 2, 3)) == (2, 20)
    tree.remove(20)
    assert tree.match((1, 2, 3)) == (0, None)


def test_what_one_adapter_computed_is_not_found_for_another() -> None:
    tree = PrefixTree()
    tree.insert(10, (1, 2, 3))
    tree.insert(20, (1, 2), "verse")
    assert tree.match((1, 2, 3)) == (3, 10)
    assert tree.match((1, 2, 3), "verse") == (2, 20)
    assert tree.match((1, 2, 3), "prose") == (0, None)
    tree.remove(20)
    assert tree.match((1, 2, 3), "verse") == (0, None)
    assert tree.match((1, 2, 3)) == (3, 10)


RUNS = st.lists(st.integers(0, 2), max_size=8)


@given(st.lists(st.tuples(st.booleans(), RUNS, RUNS), max_size=30))
def test_it_finds_what_a_search_through_all_holders_finds(
    steps: list[tuple[bool, list[int], list[int]]],
) -> None:
    tree = PrefixTree()
    held: dict[int, list[int]] = {}
    for number, (inserts, run, sought) in enumerate(steps):
        if inserts or not held:
            tree.insert(number, run)
            held[number] = run
        else:
            gone = list(held)[len(run) % len(held)]
            tree.remove(gone)
            del held[gone]
        length, holder = tree.match(sought)
        common = {other: _common(tokens, sought) for other, tokens in held.items()}
        assert length == max(common.values(), default=0)
        assert (holder is None) == (length == 0)
        assert holder is None or common[holder] == length


def _common(left: list[int], right: list[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count
