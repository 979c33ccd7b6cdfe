"""The core's state in numbers: what metrics show and tests compare."""

from dataclasses import dataclass

from router.core.state import Group


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    preempted: int = 0
    resumed: int = 0
    prefix_hit_tokens: int = 0
    admitted_tokens: int = 0
    moved: int = 0


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """One group, in sequences and tokens.

    ``kv_used`` is what running sequences hold or have reserved. Donors hold ``kv_donors`` more,
    which they give up as soon as it is needed.
    """

    name: str
    epoch: int
    model: str
    running: int
    donors: int
    kv_total: int
    kv_used: int
    kv_donors: int
    plans_in_flight: int
    plans: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole core; counters count since the start."""

    waiting: int
    running: int
    groups: tuple[GroupSnapshot, ...]
    preempted: int
    resumed: int
    prefix_hit_tokens: int
    admitted_tokens: int
    moved: int = 0


def take_snapshot(waiting: int, groups: list[Group], counts: Counters) -> Snapshot:
    """Copies the numbers out."""
    return Snapshot(
        waiting,
        sum(group.running for group in groups),
        tuple(_group(group) for group in groups),
        counts.preempted,
        counts.resumed,
        counts.prefix_hit_tokens,
        counts.admitted_tokens,
        counts.moved,
    )


def _group(group: Group) -> GroupSnapshot:
    donors = sum(
        group.ledger.charge_of(donor.account)
        for donor in group.donors.values()
        if donor.account is not None
    )
    return GroupSnapshot(
        group.up.group,
        group.up.epoch,
        group.up.model,
        group.running,
        len(group.donors),
        group.ledger.capacity,
        group.ledger.charged - donors,
        donors,
        len(group.in_flight),
        group.plans,
    )
