"""What the core looked like before a turn."""

from router.core.ledger import Account
from router.core.scheduler import Core
from router.core.state import Group, Sequence

Places = dict[int, Group | None]


class Turn:
    """What the core looked like before a call of ``plan``, to be compared with after."""

    def __init__(self, core: Core) -> None:
        self.places: Places = {number: sequence.group for number, sequence in core._live.items()}
        self.donors = {name: list(group.donors) for name, group in core._groups.items()}
        self.pinned = {name: pinned(group) for name, group in core._groups.items()}
        self.ran = {name for name, group in core._groups.items() if group.running}
        self.lives = dict(core._groups)
        self.charged = {name: group.ledger.charged for name, group in core._groups.items()}
        self.reserved = {
            number: sequence.account.reserved
            for number, sequence in core._live.items()
            if sequence.account is not None
        }
        self.preempted = core.counters.preempted


def pinned(group: Group) -> set[int]:
    """Those whose memory a placed sequence is yet to share."""
    accounts = [s.account for s in group.filling.values() if not s.admitted]
    return {a.parent.holder for a in accounts if a is not None and a.parent is not None}


def account_of(member: Sequence) -> Account:
    """The account of a sequence that is placed."""
    assert member.account is not None
    return member.account
