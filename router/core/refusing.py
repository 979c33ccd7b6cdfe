"""Which groups could run a request to its end, and what its client is told if none can."""

from collections.abc import Sequence as Seq

from router.core.effects import Close
from router.core.events import Reason
from router.core.placing import fits_ever, missing_adapter, missing_feature
from router.core.state import Group, Sequence


def able(group: Group, sequence: Sequence) -> bool:
    """Whether the group, if it were empty, could run the sequence to its end."""
    lacking = missing_feature(group, sequence) or missing_adapter(group, sequence)
    return lacking is None and fits_ever(group, sequence)


def refusal_of(groups: Seq[Group], sequence: Sequence) -> Close | None:
    """Why none of the groups, which serve the model, could run the sequence, if that is so.

    Where there is no group nothing is known, and the sequence may wait for one.
    """
    if not groups or any(able(group, sequence) for group in groups):
        return None
    groups = [group for group in groups if missing_adapter(group, sequence) is None]
    if not groups:
        detail = f"no worker that is up has the adapter {sequence.facts.adapter}"
        return Close(sequence.id, Reason.UNSUPPORTED, detail)
    for group in groups:
        feature = missing_feature(group, sequence)
        if feature is not None:
            detail = f"engine {group.up.engine} does not support {feature}"
            return Close(sequence.id, Reason.UNSUPPORTED, detail)
    most = max(min(group.up.limits.length_max, group.ledger.capacity) for group in groups)
    detail = f"prompt and answer may have {sequence.end} tokens, but a worker holds {most}"
    return Close(sequence.id, Reason.TOO_LONG, detail)
