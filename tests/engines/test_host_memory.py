"""Of the machine's memory each rank on it has its part."""

import os

import pytest

from shards.engines.host_memory import RANKS_HERE, memory_bytes

WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("told", "parts"), [("", 1), ("1", 1), ("2", 2), ("8", 8), ("0", 1), ("-2", 1), ("two", 1)]
)
def test_the_ranks_of_a_machine_share_its_memory(
    told: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RANKS_HERE, told)
    assert memory_bytes() == WHOLE // parts


def test_one_that_is_told_of_no_others_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RANKS_HERE, raising=False)
    assert memory_bytes() == WHOLE
