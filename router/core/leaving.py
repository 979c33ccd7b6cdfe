"""Groups that are to go: what runs there moves on, while everything else goes on as before.

    up ──GroupLeaving──► leaving ──nothing runs there, and no plan is in flight──► Left

A sequence moves with the tokens that it has, as after a loss, but nothing is lost: as long as no
other group has room for it, it goes on producing where it is.
"""

from router.core.effects import Left
from router.core.placing import has_room, place, ranked, remove
from router.core.state import CoreConfig, Group, Sequence


def bound(sequence: Sequence, config: CoreConfig) -> bool:
    """Whether the answer may not be continued by another group than this one."""
    return sequence.admitted and sequence.produced > 0 and not config.resume_streams


def running(group: Group) -> list[Sequence]:
    """All that produce tokens here, in the order in which they were placed."""
    return [*group.decoding.values(), *group.filling.values()]


def move(sequence: Sequence, able: list[Group], config: CoreConfig) -> list[Sequence] | None:
    """Places a running sequence in one of other groups, if one has room now.

    None if not; else those that have to be placed anew, since they were to share what it held.
    """
    home = next(
        (group for group in ranked(able, sequence, config) if has_room(group, sequence, config)),
        None,
    )
    if home is None:
        return None
    assert sequence.group is not None, "only a placed sequence moves"
    displaced = remove(sequence.group, sequence)
    placed = place(home, sequence, config)
    assert placed, "a group that has room takes the sequence"
    return displaced


def tell_left(group: Group) -> list[Left]:
    """Says once that a group that leaves may go: while anything runs, a plan is in flight."""
    if group.left or group.in_flight:
        return []
    group.left = True
    return [Left(group.up.group, group.up.epoch)]
