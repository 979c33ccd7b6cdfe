"""The token account of one group: examples, and a comparison with cells counted one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.ledger import Account, Ledger


def test_reservations_are_charged_in_whole_pages() -> None:
    ledger = Ledger(capacity=19, page=4)
    assert ledger.capacity == 16
    account = ledger.open(1, reserved=5)
    assert (ledger.charged, ledger.free) == (8, 8)
    ledger.resize(account, 9)
    assert ledger.charged == 12
    ledger.close(account)
    assert ledger.charged == 0


def test_shared_tokens_are_charged_once_and_pass_to_the_heir() -> None:
    ledger = Ledger(capacity=100, page=2)
    first = ledger.open(1, reserved=24)
    second = ledger.open(2, reserved=22, parent=first, share_len=12)
    assert [ledger.charge_of(account) for account in (first, second)] == [24, 10]
    ledger.close(first)
    assert ledger.charge_of(second) == ledger.charged == 22
    ledger.close(second)
    assert ledger.charged == 0


def test_the_heir_is_the_child_that_shares_most_and_its_siblings_become_its_children() -> None:
    ledger = Ledger(capacity=100, page=1)
    first = ledger.open(1, reserved=10)
    little = ledger.open(2, reserved=10, parent=first, share_len=3)
    much = ledger.open(3, reserved=10, parent=first, share_len=8)
    ledger.close(first)
    assert (much.parent, much.share_len) == (None, 0)
    assert (little.parent, little.share_len) == (much, 3)
    assert ledger.charged == 10 + 7


def test_an_heir_takes_the_place_of_the_former_owner_under_its_parent() -> None:
    ledger = Ledger(capacity=100, page=1)
    root = ledger.open(1, reserved=10)
    middle = ledger.open(2, reserved=20, parent=root, share_len=10)
    leaf = ledger.open(3, reserved=30, parent=middle, share_len=20)
    ledger.close(middle)
    assert (leaf.parent, leaf.share_len) == (root, 10)
    assert ledger.charged == 30


def test_who_shares_no_more_than_its_parent_does_is_a_child_of_its_grandparent() -> None:
    ledger = Ledger(capacity=100, page=1)
    root = ledger.open(1, reserved=10)
    child = ledger.open(2, reserved=20, parent=root, share_len=8)
    other = ledger.open(3, reserved=20, parent=child, share_len=8)
    assert other.parent is root


@pytest.mark.parametrize(
    ("closing", "freed"),
    [
        ((1,), 0),
        ((2,), 0),
        ((3,), 10),
        ((1, 2), 0),
        ((2, 3), 20),
        ((1, 3), 10),
        ((1, 2, 3), 30),
    ],
)
def test_memory_that_others_inherit_is_not_freed(closing: tuple[int, ...], freed: int) -> None:
    ledger = Ledger(capacity=100, page=1)
    first = ledger.open(1, reserved=10)
    second = ledger.open(2, reserved=20, parent=first, share_len=10)
    third = ledger.open(3, reserved=30, parent=second, share_len=20)
    accounts = {1: first, 2: second, 3: third}
    gone = [accounts[number] for number in closing]
    stay = [account for number, account in accounts.items() if number not in closing]
    assert ledger.freed_by(gone, stay) == freed


class Cells:
    """A ledger as a naive person keeps it: the set of cells that each holder can see."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.held: dict[int, list[int]] = {}
        self.next = 0

    def new(self, count: int) -> list[int]:
        """Fresh cells, up to a whole page."""
        count = -(-count // self.page) * self.page
        self.next += count
        return list(range(self.next - count, self.next))

    def used(self) -> int:
        """How many distinct cells are held."""
        return len({cell for cells in self.held.values() for cell in cells})


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int, int]]]:
    """A page size, and steps of (what, which, tokens, share) with numbers to be taken modulo."""
    numbers = st.integers(0, 40)
    step = st.tuples(st.sampled_from(["open", "share", "share", "grow", "close"]), *[numbers] * 3)
    return draw(st.sampled_from([1, 2, 5])), draw(st.lists(step, max_size=40))


@given(histories())
def test_charges_are_the_cells_in_use(history: tuple[int, list[tuple[str, int, int, int]]]) -> None:
    page, steps = history
    ledger, cells = Ledger(10_000, page), Cells(page)
    accounts: dict[int, Account] = {}
    for number, (what, which, tokens, share) in enumerate(steps, start=1):
        chosen = list(accounts)[which % len(accounts)] if accounts else 0
        if what == "open" or not accounts:
            accounts[number] = ledger.open(number, tokens + 1)
            cells.held[number] = cells.new(tokens + 1)
        elif what == "share":
            parent = accounts[chosen]
            length = ledger.whole_pages(share % (parent.reserved + 1))
            owner = parent if length else None
            accounts[number] = ledger.open(number, length + tokens + 1, owner, length)
            cells.held[number] = cells.held[chosen][:length] + cells.new(tokens + 1)
        elif what == "grow":
            account = accounts[chosen]
            more = ledger.pages(account.reserved + tokens) - ledger.pages(account.reserved)
            ledger.resize(account, account.reserved + tokens)
            cells.held[chosen] += cells.new(more)
        else:
            gone = accounts.pop(chosen)
            before, after = cells.used(), cells.held.pop(chosen)
            assert ledger.freed_by([gone], list(accounts.values())) == before - cells.used()
            assert len(after) == ledger.pages(gone.reserved)
            ledger.close(gone)
        assert ledger.charged == cells.used()
        assert ledger.charged == sum(map(ledger.charge_of, accounts.values()))


@given(histories(), st.integers(0, 2**20))
def test_what_several_donors_free_together_is_foreseen(
    history: tuple[int, list[tuple[str, int, int, int]]], choice: int
) -> None:
    page, steps = history
    ledger = Ledger(10_000, page)
    accounts: list[Account] = []
    for number, (_, which, tokens, share) in enumerate(steps, start=1):
        parent = accounts[which % len(accounts)] if accounts else None
        length = 0 if parent is None else ledger.whole_pages(share % (parent.reserved + 1))
        owner = parent if length else None
        accounts.append(ledger.open(number, length + tokens + 1, owner, length))
    going = [account for index, account in enumerate(accounts) if choice >> index % 20 & 1]
    staying = [account for account in accounts if account not in going]
    foreseen, before = ledger.freed_by(going, staying), ledger.charged
    for account in going:
        ledger.close(account)
    assert before - ledger.charged == foreseen
