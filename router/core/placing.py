"""Where a request goes and what makes room for it: placement, eviction, preemption, release.

A sequence is placed when its group has reserved memory for it; it becomes resident on the workers
with the first plan that computes it. A placed sequence may count on a prefix that its parent has
yet to compute: it then waits for it, which costs it nothing, since the parent is ahead of it.
"""

from collections.abc import Iterator

from router.core.ledger import Account
from router.core.state import CoreConfig, Group, Sequence


def fits_ever(group: Group, sequence: Sequence) -> bool:
    """Whether the empty group could hold the sequence to its end."""
    return (
        sequence.end <= group.up.limits.length_max
        and group.ledger.pages(sequence.end) <= group.ledger.capacity
    )


def missing_feature(group: Group, sequence: Sequence) -> str | None:
    """The first feature that the sequence needs and the group's engine lacks."""
    for need in sequence.facts.needs:
        if need not in group.up.features:
            return need
    return None


def missing_adapter(group: Group, sequence: Sequence) -> str | None:
    """The adapter that the sequence asks for, if the group's engine does not have it."""
    adapter = sequence.facts.adapter
    return adapter if adapter and adapter not in group.up.adapters else None


def ranked(groups: list[Group], sequence: Sequence, config: CoreConfig) -> list[Group]:
    """The groups with a place in the batch: who holds most of the prompt first, then most room."""
    ready = [group for group in groups if group.running < group.batch_max]
    if len(ready) < 2:
        return ready
    return sorted(
        ready,
        key=lambda group: (shareable(group, sequence, config)[0], group.ledger.free),
        reverse=True,
    )


def shareable(group: Group, sequence: Sequence, config: CoreConfig) -> tuple[int, int | None]:
    """How many tokens the sequence could share with whom. At least one is left to compute.

    Where log probabilities of the prompt are wanted all of it is: what is shared tells none.
    """
    if not group.up.limits.shares_prefix or sequence.scores_prompt:
        return 0, None
    length, holder = group.tree.match(sequence.tokens, sequence.facts.adapter)
    length = group.ledger.whole_pages(min(length, len(sequence.tokens) - 1))
    return (0, None) if length < config.share_tokens_min else (length, holder)


def has_room(group: Group, sequence: Sequence, config: CoreConfig) -> bool:
    """Whether the sequence would be placed if it were tried now."""
    if not group.running:
        return True
    share_len, donor = shareable(group, sequence, config)
    pages = group.ledger.pages(_reserve(sequence, config))
    return _can_make_room(group, pages - share_len, keep=donor)


def place(group: Group, sequence: Sequence, config: CoreConfig) -> bool:
    """Reserves memory for the sequence, evicting donors as needed. False: it has to wait."""
    share_len, donor = shareable(group, sequence, config)
    reserve = _reserve(sequence, config)
    pages = group.ledger.pages(reserve)
    if not _make_room(group, pages - share_len, keep=donor):
        if group.running:
            return False
        # Nothing runs, so nothing will free memory: give up the donor that was to be shared.
        share_len, donor = 0, None
        alone = _make_room(group, pages, keep=None)
        assert alone, "a sequence that fits the empty group does not fit it"
    parent = group.holder(donor).account if donor is not None else None
    sequence.group = group
    sequence.account = group.ledger.open(sequence.id, reserve, parent, share_len)
    group.filling[sequence.id] = sequence
    group.tree.insert(sequence.id, sequence.tokens, sequence.facts.adapter)
    if donor is not None and donor in group.donors:
        group.donors[donor] = group.donors.pop(donor)
    return True


def _reserve(sequence: Sequence, config: CoreConfig) -> int:
    """Tokens for which a sequence that is placed reserves memory."""
    return min(sequence.end, len(sequence.tokens) + config.reserve_tokens)


def _can_make_room(group: Group, tokens: int, keep: int | None) -> bool:
    """Whether tokens and one place would be free if all donors went but the one to ``keep``."""
    if tokens > group.ledger.free and not _donors_hold(group, tokens - group.ledger.free, keep):
        return False
    full = group.resident >= group.up.limits.sequences_max
    return not full or any(donor.id != keep for donor in _evictable(group))


def _make_room(group: Group, tokens: int, keep: int | None) -> bool:
    """Evicts donors, the least recently used first, until tokens and one place are free.

    Touches nothing if all of them together would not do.
    """
    if not _can_make_room(group, tokens, keep):
        return False
    while tokens > group.ledger.free or group.resident >= group.up.limits.sequences_max:
        remove(group, next(donor for donor in _evictable(group) if donor.id != keep))
    return True


def _donors_hold(group: Group, tokens: int, keep: int | None) -> bool:
    """Whether so many tokens would be free if all donors that can go went.

    A donor that nobody shares frees its charge, whatever becomes of the others. A few of those are
    nearly always enough to tell; all accounts of the group are looked at only if not.
    """
    sure = 0
    donors = []
    for donor in _evictable(group):
        if donor.id == keep:
            continue
        account = account_of(donor)
        sure += 0 if account.children else group.ledger.charge_of(account)
        if sure >= tokens:
            return True
        donors.append(donor)
    gone = {donor.id for donor in donors}
    staying = [account_of(member) for member in group.members() if member.id not in gone]
    return group.ledger.freed_by([account_of(donor) for donor in donors], staying) >= tokens


def _evictable(group: Group) -> Iterator[Sequence]:
    """The donors that no placed sequence still waits to share, least recently used first."""
    pinned: set[int] = set()
    for waiting in group.filling.values():
        parent = account_of(waiting).parent
        if parent is not None and not waiting.admitted:
            pinned.add(parent.holder)
    return (donor for donor in group.donors.values() if donor.id not in pinned)


def extend(group: Group, sequence: Sequence, config: CoreConfig) -> list[Sequence]:
    """Reserves memory further ahead. Returns those who had to give up theirs, perhaps itself.

    Donors go first, then the sequence that is last in line. The first in line is never preempted,
    and fits alone, so somebody always gets on.
    """
    preempted: list[Sequence] = []
    account = account_of(sequence)
    reserve = min(sequence.end, sequence.scheduled + 1 + config.reserve_tokens)
    more = group.ledger.pages(reserve) - group.ledger.pages(account.reserved)
    while more > group.ledger.free:
        donor = next(_evictable(group), None)
        if donor is not None:
            remove(group, donor)
            continue
        running = list(group.decoding.values()) + list(group.filling.values())
        victim = max(running, key=lambda member: member.key)
        preempted += [*remove(group, victim), victim]
        if victim is sequence:
            return preempted
    group.ledger.resize(account, reserve)
    return preempted


def retire(group: Group, sequence: Sequence) -> list[Sequence]:
    """Makes a finished sequence a donor of what it has computed, if that can be of use.

    Not if a placed sequence counts on more of it. Returns what ``remove`` returns.
    """
    account = account_of(sequence)
    known = sequence.tokens[: sequence.scheduled]
    enough = all(child.share_len <= sequence.scheduled for child in account.children)
    if not (sequence.admitted and group.up.limits.shares_prefix and known and enough):
        return remove(group, sequence)
    group.decoding.pop(sequence.id, None)
    group.filling.pop(sequence.id, None)
    group.ledger.resize(account, sequence.scheduled)
    group.tree.remove(sequence.id)
    group.tree.insert(sequence.id, known, sequence.facts.adapter)
    group.donors[sequence.id] = sequence
    _thin_out(group)
    return []


def _thin_out(group: Group) -> None:
    """Lets donors go beyond what the engine thinks worth keeping, but never the latest."""
    most = group.up.limits.donor_tokens_max
    if most is None:
        return
    while len(donors := list(_evictable(group))) > 1 and most < sum(
        group.ledger.charge_of(account_of(donor)) for donor in donors
    ):
        remove(group, donors[0])


def remove(group: Group, sequence: Sequence) -> list[Sequence]:
    """Takes a sequence out of all books of the group; its memory is free as of the next plan.

    Placed sequences that were to share it share the ledger's heir instead, or are that heir. Those
    returned have to be placed anew.
    """
    displaced = _displace(group, account_of(sequence))
    group.decoding.pop(sequence.id, None)
    group.filling.pop(sequence.id, None)
    group.donors.pop(sequence.id, None)
    group.tree.remove(sequence.id)
    group.ledger.close(account_of(sequence))
    if sequence.admitted:
        group.drops.append(sequence.id)
    sequence.leave()
    return displaced


def _displace(group: Group, account: Account) -> list[Sequence]:
    """Takes out the children that only wait, if others hold cells of the parent already.

    One that waits may want more of the parent than those hold. As the heir it would compute cells
    of its own, and theirs would be charged to nobody.
    """
    displaced: list[Sequence] = []
    if any(group.holder(child.holder).admitted for child in account.children):
        while waiting := [
            child
            for child in (group.holder(child.holder) for child in account.children)
            if not child.admitted
        ]:
            displaced += [*remove(group, waiting[0]), waiting[0]]
    return displaced


def account_of(sequence: Sequence) -> Account:
    """The account of a sequence that is placed."""
    assert sequence.account is not None
    return sequence.account
