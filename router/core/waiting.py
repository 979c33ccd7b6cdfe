"""The line in which the requests for one model wait.

The order is that of a single number, so that it is easy to reason about: the instant of arrival,
later by a head start for each step of lower priority. Within a priority this is strict first come,
first served; a more urgent request overtakes those that came at most one head start before it, so
none starves. A request that comes back (its worker was lost, or its memory was needed) keeps its
number, and is therefore at the front again. One that none of the present groups could go on with is
set aside, where it holds up nobody, until one comes up that can.
"""

import heapq

from router.core.state import Sequence


class WaitingLine:
    """A line in the order of ``Sequence.key``. Removal is lazy, so all operations are O(log n).

    ``members`` stand in it, and those in ``aside`` beside it; both are for others to read only.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], int]] = []
        self.members: dict[int, Sequence] = {}
        self.aside: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self.members) + len(self.aside)

    def __contains__(self, request: int) -> bool:
        return request in self.members or request in self.aside

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in its place."""
        assert sequence.id not in self.members
        self.members[sequence.id] = sequence
        heapq.heappush(self._heap, (sequence.key, sequence.id))

    def remove(self, request: int) -> None:
        """Takes a sequence out, wherever it stands."""
        if self.aside.pop(request, None) is None:
            del self.members[request]
            self._tidy()

    def set_aside(self, request: int) -> None:
        """Lets the others pass a sequence."""
        sequence = self.members[request]
        self.remove(request)
        self.aside[request] = sequence

    def recall(self, request: int) -> None:
        """Puts one who was set aside back into its place."""
        self.add(self.aside.pop(request))

    def head(self) -> Sequence | None:
        """The first of the line, who stays in it."""
        while self._heap:
            member = self.members.get(self._heap[0][1])
            if member is not None:
                return member
            heapq.heappop(self._heap)
        return None

    def begun(self, *, aside: bool) -> list[Sequence]:
        """Those who came back with a part of their answer: all, or of those set ``aside`` alone."""
        members = () if aside else self.members.values()
        return [one for one in (*self.aside.values(), *members) if one.produced]

    def hopes(self) -> bool:
        """Whether one of them has shown nothing, and waits only for a group that may come again."""
        return any(not sequence.produced for sequence in self.aside.values())

    def _tidy(self) -> None:
        """Drops the traces of removed members once they outnumber the members."""
        if len(self._heap) > 2 * len(self.members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self.members]
            heapq.heapify(self._heap)
