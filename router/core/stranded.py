"""Answers that have begun and wait while no group is up that could go on with them.

A request that has shown nothing may wait for a worker for as long as its own deadline allows. Of
one that has, a client reads and sees it stand still: it is told when nobody comes.
"""

from collections.abc import Sequence as Seq

from router.core.state import Sequence


class Stranded:
    """``since`` when each of them has had no group; ``timeout_ms`` is how long that may last."""

    def __init__(self, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self.since: dict[int, int] = {}

    @property
    def detail(self) -> str:
        """Why an answer is given up, for a person."""
        return f"the worker was lost, and none came up to go on within {self._timeout_ms} ms"

    def give_up(self, now_ms: int, waiting: Seq[Sequence]) -> list[Sequence]:
        """Takes note of who waits for a group now; returns those whose time is over.

        The clock of whoever is not there this time starts anew.
        """
        since = {sequence.id: self.since.get(sequence.id, now_ms) for sequence in waiting}
        over = [one for one in waiting if since[one.id] + self._timeout_ms <= now_ms]
        for sequence in over:
            del since[sequence.id]
        self.since = since
        return over

    def due_ms(self) -> int:
        """When the time of the first of them is over. There is one."""
        return min(self.since.values()) + self._timeout_ms
