"""What must have happened somewhere in a thousand worlds, or the simulation has gone blind."""

from collections import Counter

from router.core.events import Reason

_NEVER = {Reason.STOP_TOKEN, Reason.SHUTDOWN}  # the first is the service's word, as is the last

REQUIRED = (
    *(f"close {reason.value}" for reason in Reason if reason not in _NEVER),
    *(f"untrue: {kind}" for kind in ("repeated", "skipped", "missing", "hidden")),
    *(f"untrue: {kind}" for kind in ("surplus", "uneven", "swapped")),
    *("crash", "wedged", "abandoned late", "abandoned untrue", "old news", "stale outcome"),
    *("eviction", "preemption", "resume", "retry", "failure", "failure by share"),
    "loss after progress",
    *("share from running", "share from finished", "share of an answer", "share after a loss"),
    *("heir", "heir not admitted yet", "wait for a parent", "wait for room"),
    *("adapter", "strange adapter", "share with an adapter", "adapter elsewhere"),
    *("prompt scored", "share from a scored prompt"),
    *(f"untrue: {kind}" for kind in ("gap", "overlong", "unscored")),
    *("moved", "moved in mid-answer", "turned out", "ends where it is", "left"),
    *("leaving again", "old leaving"),
    *("stranded", "given up", "set aside", "set aside without a token"),
    *("waits for who is away", "crowded aside", "gone for good", "hope is over"),
    *("token thrown away", "priority", "two models", "needs", "resized", "follow-up", "choice"),
)


def missing(seen: Counter[str]) -> list[str]:
    """What has not happened."""
    return [kind for kind in REQUIRED if not seen[kind]]
