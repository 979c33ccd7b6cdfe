"""Block tables against the account of ``Residents``: the same cells, and the same on every rank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.engines.base import Admit, Plan, PlanError, SamplingParams
from shards.kv import TRASH, PageTables, lay_out
from shards.residents import Limits, Resident, Residents

LIMITS = Limits(
    kv_tokens=64,
    page_tokens=4,
    sequences_max=5,
    step_tokens_max=20,
    length_max=40,
    vocab_size=100,
)


class Rank:
    """What one rank keeps, driven by plans."""

    def __init__(self) -> None:
        self.residents = Residents(LIMITS)
        self.tables = PageTables(LIMITS.kv_tokens, LIMITS.page_tokens)

    def apply(self, plan: Plan) -> None:
        self.residents.check(plan)
        for sequence in plan.drops:
            self.tables.drop(self.residents.drop(sequence).sequence)
        for admit in plan.admits:
            self.residents.admit(admit)
            if admit.share_len:
                self.tables.share(admit.share_from, admit.sequence, admit.share_len)
        work = [(self.residents.by_sequence[number], count) for number, count in plan.work]
        for resident, count in work:
            self.tables.extend(resident.sequence, resident.computed + count)
            self.residents.compute(resident, count)

    def pages(self) -> dict[int, list[int]]:
        return {number: list(self.tables.table(number)) for number in self.residents.by_sequence}


def random_plan(rank: Rank, data: st.DataObject, number: int) -> Plan:
    """A plan that may well break the contract."""
    resident = sorted(rank.residents.by_sequence)
    drops = data.draw(st.lists(st.sampled_from(resident), max_size=1)) if resident else []
    admits = []
    if data.draw(st.booleans()):
        length = data.draw(st.integers(1, 30))
        share = data.draw(st.integers(0, 7)) * LIMITS.page_tokens
        donor = data.draw(st.sampled_from(resident)) if resident and share else 0
        sampling = SamplingParams()
        share = share if donor else 0
        admits.append(Admit(number, [1] * length, length, sampling, donor, share))
    able = [*resident, *(admit.sequence for admit in admits)]
    work = [(one, data.draw(st.integers(1, 12))) for one in able if data.draw(st.booleans())]
    return Plan(drops=drops, admits=admits, work=work)


@given(st.data())
def test_tables_agree_with_the_account(data: st.DataObject) -> None:
    first, second = Rank(), Rank()
    for number in range(1, 25):
        plan = random_plan(first, data, number)
        try:
            first.apply(plan)
        except PlanError:
            continue
        second.apply(plan)
        pages = first.pages()
        assert pages == second.pages()
        held = {page for table in pages.values() for page in table}
        assert TRASH not in held
        assert len(held) == first.tables.used
        assert first.tables.used * LIMITS.page_tokens == first.residents.kv_used
        for number_, resident in first.residents.by_sequence.items():
            assert len(pages[number_]) * 4 == first.residents.pages(resident.computed)


def test_a_layout_names_the_cells_of_each_token() -> None:
    rank = Rank()
    rank.apply(Plan(admits=[admit(1, range(10, 16))], work=[(1, 6)]))
    rank.apply(Plan(admits=[admit(2, [10, 11, 12, 13, 20, 21, 22], 1, 4)]))
    one, two = rank.residents.by_sequence[1], rank.residents.by_sequence[2]
    one.tokens.append(16)
    layout = lay_out(rank.tables, [(one, 1), (two, 2)], [one])
    assert layout.tokens.tolist() == [16, 20, 21]
    assert layout.positions.tolist() == [6, 4, 5]
    assert layout.starts.tolist() == [0, 1, 3]
    assert layout.lengths.tolist() == [7, 6]
    assert layout.tables.tolist() == [[1, 2], [1, 3]]
    assert layout.cells.tolist() == [2 * 4 + 2, 3 * 4, 3 * 4 + 1]
    assert layout.draws.tolist() == [0]
    assert layout.cells.dtype == np.int32


def test_memory_is_taken_in_whole_pages() -> None:
    rank = Rank()
    for number in range(1, 5):
        rank.apply(Plan(admits=[admit(number, range(13))], work=[(number, 13)]))
    with pytest.raises(PlanError, match="68 KV tokens would be in use"):
        rank.apply(Plan(admits=[admit(5, [1])], work=[(5, 1)]))
    rank.apply(Plan(drops=[1], admits=[admit(5, [1])], work=[(5, 1)]))


def admit(sequence: int, tokens: object, donor: int = 0, share: int = 0) -> Admit:
    known = list(tokens)  # type: ignore[call-overload]
    return Admit(sequence, known, len(known), SamplingParams(), donor, share)


def test_a_page_is_free_when_its_last_holder_goes() -> None:
    rank = Rank()
    rank.apply(Plan(admits=[admit(1, range(8))], work=[(1, 8)]))
    rank.apply(Plan(admits=[admit(2, range(9), 1, 8)], work=[(2, 1)]))
    rank.apply(Plan(drops=[1]))
    assert rank.tables.used == 3
    assert isinstance(rank.residents.by_sequence[2], Resident)
    rank.apply(Plan(drops=[2]))
    assert rank.tables.used == 0
