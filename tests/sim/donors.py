"""What must hold of donors: as many stay as are worth keeping, and nobody is preempted for them."""

from collections.abc import Sequence as Seq

from router.core.effects import Close, Effect
from router.core.scheduler import Core
from router.core.state import Group, Sequence
from tests.sim.books import Books
from tests.sim.turn import Turn, account_of, pinned
from tests.sim.worker import ensure


def evictable(group: Group) -> list[Sequence]:
    """Those that no placed sequence is yet to share, the one used least recently first."""
    held = pinned(group)
    return [donor for donor in group.donors.values() if donor.id not in held]


def charge(group: Group, donors: Seq[Sequence]) -> int:
    """What they are charged together."""
    return sum(group.ledger.charge_of(account_of(donor)) for donor in donors)


class Scarce:
    """The donors of groups for which more than so many are not worth keeping, before an event."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._before = {
            name: (list(group.donors), charge(group, evictable(group)))
            for name, group in core._groups.items()
            if group.up.limits.donor_tokens_max is not None
        }

    def check(self, effects: Seq[Effect]) -> None:
        """After the event: an answer that ended thins the donors out, and no more than is due."""
        closed = [effect.request for effect in effects if isinstance(effect, Close)]
        for name, (donors, charged) in self._before.items():
            group = self._core._groups.get(name)
            if group is None or len(closed) != 1:
                continue
            most = group.up.limits.donor_tokens_max
            assert most is not None
            left = evictable(group)
            if closed[0] in group.donors:
                ensure(len(left) < 2 or charge(group, left) <= most, "too many donors are kept")
                charged += charge(group, [group.donors[closed[0]]])
            gone = [donor for donor in donors if donor not in group.donors]
            if charged <= most:
                ensure(not gone, f"donors {gone} go though they are worth keeping")
            older = donors[: donors.index(gone[-1])] if gone else []
            ensure(not {one.id for one in left} & set(older), f"older donors than {gone} stay")


def check_donors(books: Books, core: Core, before: Turn, preemptions: int) -> None:
    """Donors are of use, and whoever was preempted in a turn had to go: no donor was left for it.

    Not if somebody was preempted whom no worker knows: whom it was to share nobody can tell.
    """
    for group in core._groups.values():
        ensure(group.up.limits.shares_prefix or not group.donors, "donors are of no use there")
    told = books.seen["preemption"] - preemptions
    if core.counters.preempted - before.preempted != told:
        return
    for name, group in core._groups.items():
        book = books.groups[name]
        if book.robbed and before.lives.get(name) is group:
            spare = [
                donor.id
                for donor in evictable(group)
                if donor.id not in before.pinned[name] and not account_of(donor).children
            ]
            ensure(not spare, f"somebody is preempted, and donors {spare} stay")
