"""Streams of a divided cache: nothing is lost when sequences move, and those at work lie together.

The cache of these tests keeps what llama.cpp would: for each stream the tokens whose cells are
there. It refuses what llama.cpp does not do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.engines.base import SamplingParams
from shards.engines.caller import Work
from shards.engines.llama_layouts import MOVES_MAX, Streams
from shards.residents import Limits, Resident, Residents
from tests.engines.contract import admit

SLOTS = 6
LIMITS = Limits(10_000, 1, SLOTS, 10_000, 1000, 1000)


@dataclass
class Cache:
    """Cells of streams; ``copies`` counts what was copied."""

    streams: list[list[int]] = field(default_factory=lambda: [[] for _ in range(SLOTS + 1)])
    copies: int = 0

    def drop(self, slot: int) -> None:
        self.streams[slot] = []

    def share(self, source: int, target: int, length: int) -> None:
        raise AssertionError("parts of a divided cache have no cells in common")

    def copy(self, source: int, target: int) -> None:
        assert source != target
        assert not self.streams[target], "llama.cpp would forget what is there"
        self.streams[target] = list(self.streams[source])
        self.copies += 1

    def cut(self, slot: int, length: int) -> None:
        del self.streams[slot][length:]

    def compute(self, work: Work, streams: Streams) -> None:
        for resident, count in work:
            cells = self.streams[streams.place(resident.slot)]
            assert cells == resident.tokens[: resident.computed]
            cells += resident.tokens[resident.computed : resident.computed + count]


class Engine:
    """What of an engine concerns the layout."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.streams = Streams(self.cache, SLOTS + 1)
        self.residents = Residents(LIMITS)
        self.last = 0

    def admit(self, length: int) -> None:
        self.last += 1
        tokens = [self.last * 100 + n for n in range(length)]
        self.residents.admit(admit(self.last, tokens, SamplingParams()))

    def share(self, donor: Resident, length: int) -> None:
        self.last += 1
        tokens = [*donor.tokens[:length], self.last * 100]
        made = admit(self.last, tokens, share_from=donor.sequence, share_len=length)
        resident = self.residents.admit(made)
        self.streams.share(donor.slot, resident.slot, length)

    def drop(self, sequence: int) -> None:
        self.streams.let_go(self.residents.drop(sequence).slot)

    def step(self, chosen: Sequence[Resident]) -> list[int]:
        """Computes one token of each; returns the streams in the order of the batch."""
        for resident in chosen:
            if resident.computed == len(resident.tokens):
                resident.tokens.append(resident.computed)
        work = self.streams.arrange([(resident, 1) for resident in chosen])
        assert {id(one) for one, _ in work} == {id(one) for one in chosen}
        self.cache.compute(work, self.streams)
        for resident, count in work:
            self.residents.compute(resident, count)
        return [self.streams.place(resident.slot) for resident, _ in work]


def together(streams: list[int]) -> bool:
    return streams == list(range(streams[0], streams[0] + len(streams)))


@given(st.data())
def test_no_cell_is_lost_and_work_comes_together(data: st.DataObject) -> None:
    engine = Engine()
    for _ in range(data.draw(st.integers(1, 25))):
        residents = list(engine.residents.by_sequence.values())
        if len(residents) < SLOTS and data.draw(st.booleans(), label="admit"):
            donors = [one for one in residents if one.computed]
            donor = data.draw(st.sampled_from([None, *donors]), label="donor")
            if donor is None:
                engine.admit(data.draw(st.integers(1, 3)))
            else:
                engine.share(donor, data.draw(st.integers(1, donor.computed)))
        if residents and data.draw(st.booleans(), label="drop"):
            engine.drop(data.draw(st.sampled_from(residents)).sequence)
        residents = list(engine.residents.by_sequence.values())
        if residents:
            chosen = data.draw(st.lists(st.sampled_from(residents), min_size=1, unique_by=id))
            before = engine.cache.copies
            streams = engine.step(chosen)
            assert streams == sorted(streams)
            assert engine.cache.copies - before <= MOVES_MAX
    residents = list(engine.residents.by_sequence.values())
    if residents:
        chosen = data.draw(st.lists(st.sampled_from(residents), min_size=1, unique_by=id))
        seen = [engine.step(chosen) for _ in range(SLOTS)]
        assert together(seen[-1])


def filled(count: int) -> tuple[Engine, list[Resident]]:
    engine = Engine()
    for _ in range(count):
        engine.admit(2)
    residents = list(engine.residents.by_sequence.values())
    engine.step(residents)
    return engine, residents


def test_work_that_lies_together_moves_nobody() -> None:
    engine, residents = filled(SLOTS)
    for chosen in (residents, residents[::-1], residents[2:5], residents[3:4]):
        assert together(engine.step(chosen))
    assert engine.cache.copies == 0


def test_a_new_sequence_takes_the_gap_of_one_that_ended() -> None:
    engine, residents = filled(4)
    engine.drop(residents[1].sequence)
    engine.admit(2)
    going = list(engine.residents.by_sequence.values())
    assert together(engine.step(going))
    assert engine.cache.copies == 0


def test_a_gap_costs_one_copy_and_one_more_if_somebody_rests_in_it() -> None:
    engine, residents = filled(4)
    engine.drop(residents[1].sequence)
    assert together(engine.step([residents[0], residents[2], residents[3]]))
    assert engine.cache.copies == 1
    engine, residents = filled(SLOTS)
    assert together(engine.step([residents[0], residents[2], residents[3]]))
    assert engine.cache.copies == 2


def test_a_reset_forgets_who_was_where() -> None:
    engine, residents = filled(SLOTS)
    engine.streams.clear()
    with pytest.raises(KeyError):
        engine.streams.place(residents[0].slot)
