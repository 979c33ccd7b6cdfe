"""What became of each model's requests, in sums: what Triton's clients call ModelStatistics.

Other than the metrics, this knows of the requests of gateways, too: they ran here.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from router.core.events import Reason
from router.errors import FAULT_OF_REASON


class Life(Protocol):
    """One request in numbers; see ``router.metrics.Lifetime``."""

    model: str
    submitted_ms: int
    admitted_ms: int


@dataclass(slots=True)
class Sum:
    """How often something happened, and the seconds of all together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """It happened again."""
        self.count += 1
        self.seconds += seconds


@dataclass(slots=True)
class ModelCounts:
    """The requests of one model that the core has known.

    ``succeeded`` and ``failed`` are whole requests. Of those that succeeded, ``queued`` is the part
    before the first plan, and ``inferred`` the rest. ``latest_ms`` is when the latest was
    submitted, in milliseconds since 1970, and 0 before any.
    """

    latest_ms: int = 0
    succeeded: Sum = field(default_factory=Sum)
    failed: Sum = field(default_factory=Sum)
    queued: Sum = field(default_factory=Sum)
    inferred: Sum = field(default_factory=Sum)


class Models:
    """Counts requests by model, and the steps of each group by how many sequences they computed."""

    def __init__(self) -> None:
        self._models: dict[str, ModelCounts] = {}
        self._steps: dict[str, defaultdict[int, Sum]] = {}

    def of(self, model: str) -> ModelCounts:
        """The counts of a model; all are 0 for one that nobody has asked."""
        return self._models.get(model) or ModelCounts()

    def steps(self, group: str) -> Mapping[int, Sum]:
        """The steps of a group that computed so many sequences, with the engine's time for them."""
        return self._steps.get(group, {})

    def sums(self, group: str) -> defaultdict[int, Sum]:
        """The same, for whoever counts the steps of the group."""
        return self._steps.setdefault(group, defaultdict(Sum))

    def submitted(self, model: str) -> None:
        """A request was handed to the core."""
        self._models.setdefault(model, ModelCounts()).latest_ms = time.time_ns() // 1_000_000

    def ended(self, life: Life, reason: Reason, now_ms: int) -> None:
        """A request that the core knew has ended."""
        counts = self._models.setdefault(life.model, ModelCounts())
        whole_s = (now_ms - life.submitted_ms) / 1000
        if FAULT_OF_REASON.get(reason) is not None:
            counts.failed.add(whole_s)
            return
        waited_s = whole_s
        if life.admitted_ms >= 0:
            waited_s = (life.admitted_ms - life.submitted_ms) / 1000
        counts.succeeded.add(whole_s)
        counts.queued.add(waited_s)
        counts.inferred.add(whole_s - waited_s)

    def forget(self, group: str) -> None:
        """A group is gone for good."""
        self._steps.pop(group, None)
