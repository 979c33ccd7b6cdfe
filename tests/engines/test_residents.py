"""The account of KV cells against a plain model: sets of cells that sequences hold."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shards.engines.base import Admit, Plan, PlanError, SamplingParams
from shards.residents import Limits, Residents

LIMITS = Limits(
    kv_tokens=60,
    page_tokens=1,
    sequences_max=6,
    step_tokens_max=25,
    length_max=30,
    vocab_size=100,
)


class Model(RuleBasedStateMachine):
    """Each cell is a number; a sequence holds a list of them, the shared ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.residents = Residents(LIMITS)
        self.cells: dict[int, list[int]] = {}
        self.known: dict[int, int] = {}
        self.fresh = count()
        self.numbers = count(1)

    def used(self) -> int:
        return len({cell for cells in self.cells.values() for cell in cells})

    @rule(length=st.integers(1, 30), data=st.data(), shares=st.booleans())
    def admit(self, length: int, data: st.DataObject, shares: bool) -> None:
        sequence = next(self.numbers)
        donor, share = 0, 0
        able = [n for n, cells in self.cells.items() if cells]
        if shares and able and length > 1:
            donor = data.draw(st.sampled_from(able))
            share = data.draw(st.integers(1, min(length - 1, len(self.cells[donor]))))
        admit = Admit(sequence, [1] * length, length, SamplingParams(), donor, share)
        if len(self.cells) == LIMITS.sequences_max:
            with pytest.raises(PlanError, match="sequences_max"):
                self.residents.check(Plan(admits=[admit]))
            return
        self.residents.check(Plan(admits=[admit]))
        self.residents.admit(admit)
        self.cells[sequence] = self.cells[donor][:share] if share else []
        self.known[sequence] = length

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.cells)))
        cells = self.cells[sequence]
        pending = self.known[sequence] - len(cells)
        wanted = data.draw(st.integers(0, 30))
        plan = Plan(work=[(sequence, wanted)])
        fits = (
            0 < wanted <= min(pending, LIMITS.step_tokens_max)
            and len(cells) + wanted <= LIMITS.length_max
            and self.used() + wanted <= LIMITS.kv_tokens
        )
        if not fits:
            with pytest.raises(PlanError):
                self.residents.check(plan)
            return
        self.residents.check(plan)
        resident = self.residents.by_sequence[sequence]
        draws = self.residents.compute(resident, wanted)
        cells += [next(self.fresh) for _ in range(wanted)]
        assert draws == (len(cells) == self.known[sequence])
        if draws:
            resident.tokens.append(1)
            self.known[sequence] += 1

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        leaving = data.draw(st.lists(st.sampled_from(sorted(self.cells)), unique=True, min_size=1))
        self.residents.check(Plan(drops=leaving))
        kept = {n: cells for n, cells in self.cells.items() if n not in leaving}
        freed = self.used() - len({cell for cells in kept.values() for cell in cells})
        assert self.residents._freed_by(set(leaving)) == freed
        for sequence in leaving:
            self.residents.drop(sequence)
        self.cells = kept

    @invariant()
    def the_account_is_right(self) -> None:
        assert self.residents.kv_used == self.used()
        slots = [resident.slot for resident in self.residents.by_sequence.values()]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < LIMITS.sequences_max for slot in slots)
        for sequence, cells in self.cells.items():
            assert self.residents.by_sequence[sequence].computed == len(cells)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_sharing_the_same_prefix_again_and_again_costs_no_memory() -> None:
    """A prompt that stays resident for days is shared and left thousands of times."""
    residents = Residents(LIMITS)
    tokens = [1] * 20
    donor = residents.admit(Admit(1, tokens, 20, SamplingParams()))
    residents.compute(donor, 20)
    for sequence in range(2, 1000):
        residents.admit(Admit(sequence, tokens, 20, SamplingParams(), 1, 5 + sequence % 10))
        residents.drop(sequence)
    spans, span = 0, donor.span
    while span is not None:
        spans, span = spans + 1, span.parent
    assert spans <= 11
    assert residents.kv_used == 20


def test_pages_are_shared_whole() -> None:
    residents = Residents(
        Limits(
            kv_tokens=64,
            page_tokens=16,
            sequences_max=4,
            step_tokens_max=64,
            length_max=64,
            vocab_size=10,
        )
    )
    donor = residents.admit(Admit(1, [1] * 40, 40, SamplingParams()))
    residents.compute(donor, 40)
    with pytest.raises(PlanError, match="pages hold 16"):
        residents.check(Plan(admits=[Admit(2, [1] * 40, 40, SamplingParams(), 1, 20)]))
    residents.check(Plan(admits=[Admit(2, [1] * 40, 40, SamplingParams(), 1, 32)]))


def test_a_shared_prefix_must_be_the_same_tokens() -> None:
    residents = Residents(LIMITS)
    donor = residents.admit(Admit(1, [1, 2, 3, 4], 4, SamplingParams()))
    residents.compute(donor, 4)
    with pytest.raises(PlanError, match="tokens differ"):
        residents.check(Plan(admits=[Admit(2, [1, 9, 3, 4], 4, SamplingParams(), 1, 3)]))


@pytest.mark.parametrize("fellow", [False, True])
def test_a_shared_prefix_must_be_of_the_same_adapter(fellow: bool) -> None:
    """Whether the donor is there already, or is admitted by the same plan as a copy itself."""
    residents = Residents(LIMITS)
    tokens = [1, 2, 3, 4]
    donor = residents.admit(Admit(1, tokens, 4, SamplingParams(), adapter="verse"))
    residents.compute(donor, 4)
    admits = [Admit(2, tokens, 4, SamplingParams(), 1, 3, "verse")]
    residents.check(Plan(admits=admits))
    source = 2 if fellow else 1
    for other in ("", "prose"):
        wrong = Admit(3, tokens, 4, SamplingParams(), source, 3, other)
        with pytest.raises(PlanError, match="different adapters"):
            residents.check(Plan(admits=[*admits, wrong]))
