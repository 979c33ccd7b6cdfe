"""Where sequences lie in llama.cpp's KV cache: in one pool for all, or each in a stream of its own.

In one pool a shared prefix costs nothing, and a sequence may be as long as the pool. But every row
of a step reads the mask of everybody's cells. With streams it reads only its own sequence's: at 32
sequences of 600 tokens a step takes less than half the time on a CPU. For that a stream bounds the
length of its sequence, its memory is taken whether used or not, and a prefix is shared by a copy.

llama.cpp computes streams at once only if they lie side by side, and have equally many tokens of a
step [1]; each run of neighbours is a pass over all weights. So ``Streams`` keeps those at work side
by side: it moves others out of the way. One stream more than there may be sequences is never in
use by all, so there is always one to move to.

[1] ``llama_batch_allocr::split_equal`` of llama.cpp, called for several streams as sequential.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from shards.engines.caller import Work

# A copy moves a whole stream, whatever is in it: what one step may cost more is bounded.
MOVES_MAX = 2
# A prefix is shared in runs of so many tokens: fewer are computed sooner than a stream is copied.
SHARED_TOKENS = 32


class Cells(Protocol):
    """What a layout needs of the cache, which ``Context`` has; numbers are sequence ids."""

    def drop(self, slot: int) -> None:
        """Frees the cells that only this sequence has."""

    def share(self, source: int, target: int, length: int) -> None:
        """Lets a sequence have the first cells of another one."""

    def copy(self, source: int, target: int) -> None:
        """Copies a whole stream to an empty one."""

    def cut(self, slot: int, length: int) -> None:
        """Frees the cells of the positions from ``length`` on."""


class Layout(Protocol):
    """Where the sequences of an engine's slots lie."""

    def place(self, slot: int) -> int:
        """The sequence id of a slot."""

    def share(self, donor: int, slot: int, length: int) -> None:
        """Starts a slot as a copy of the first tokens of another one."""

    def let_go(self, slot: int) -> None:
        """Frees a slot."""

    def arrange(self, work: Work) -> Work:
        """The work in the order in which it is computed fastest, all of one step at once."""

    def clear(self) -> None:
        """Forgets all slots, whose cells are free already."""


class Pool:
    """All sequences in one pool of cells: a slot is a sequence id, in any order."""

    def __init__(self, cells: Cells) -> None:
        self._cells = cells

    def place(self, slot: int) -> int:
        """See ``Layout``."""
        return slot

    def share(self, donor: int, slot: int, length: int) -> None:
        """See ``Layout``."""
        self._cells.share(donor, slot, length)

    def let_go(self, slot: int) -> None:
        """See ``Layout``."""
        self._cells.drop(slot)

    def arrange(self, work: Work) -> Work:
        """See ``Layout``."""
        return work

    def clear(self) -> None:
        """See ``Layout``."""


class Streams:
    """Each sequence in a stream of its own, those at work side by side.

    ``count`` is the number of streams, one more than there are slots. A slot has a stream from its
    first work, or its share, on: one without a stream has nothing in the cache.
    """

    def __init__(self, cells: Cells, count: int) -> None:
        self._cells = cells
        self._count = count
        self._stream_of: dict[int, int] = {}
        self._slot_in: dict[int, int] = {}

    def place(self, slot: int) -> int:
        """See ``Layout``."""
        return self._stream_of[slot]

    def share(self, donor: int, slot: int, length: int) -> None:
        """See ``Layout``. The donor's stream is copied, and what is beyond ``length`` is cut."""
        source = self._stream_of[donor]
        target = min(self._free(), key=lambda stream: abs(stream - source))
        self._settle(slot, target)
        self._cells.copy(source, target)
        self._cells.cut(target, length)

    def let_go(self, slot: int) -> None:
        """See ``Layout``."""
        stream = self._stream_of.pop(slot, None)
        if stream is not None:
            del self._slot_in[stream]
            self._cells.drop(stream)

    def arrange(self, work: Work) -> Work:
        """See ``Layout``. Streams ascend, as llama.cpp takes neighbours only in that order."""
        slots = [resident.slot for resident, _ in work]
        if not self._side_by_side(slots):
            self._gather(slots)
        return sorted(work, key=lambda pair: self._stream_of[pair[0].slot])

    def clear(self) -> None:
        """See ``Layout``."""
        self._stream_of.clear()
        self._slot_in.clear()

    def _side_by_side(self, slots: Sequence[int]) -> bool:
        streams = [self._stream_of.get(slot, -1) for slot in slots]
        first = min(streams)
        return first >= 0 and max(streams) - first < len(streams)

    def _gather(self, slots: Sequence[int]) -> None:
        """Brings the slots closer together, those without a stream first: they cost no copy."""
        at_work = set(slots)
        inside = self._window(at_work)
        gaps = [stream for stream in inside if self._slot_in.get(stream) not in at_work]
        gaps.sort(key=self._slot_in.__contains__)
        new = [slot for slot in slots if slot not in self._stream_of]
        far = [slot for slot in slots if self._stream_of.get(slot, inside[0]) not in inside]
        moves = MOVES_MAX
        for slot, gap in zip(new + far, gaps, strict=True):
            copies = (gap in self._slot_in) + (slot in self._stream_of)
            if copies <= moves and self._vacate(gap, inside):
                self._move(slot, gap)
                moves -= copies
            elif slot not in self._stream_of:
                self._settle(slot, min(self._free(), key=lambda free: abs(free - gap)))

    def _window(self, slots: set[int]) -> range:
        """The neighbouring streams that these slots can have with the fewest copies."""
        weights = [0] * self._count
        for stream, slot in self._slot_in.items():
            weights[stream] = -1 if slot in slots else 1
        sums = [0, *accumulate(weights)]
        length = len(slots)
        starts = range(self._count - length + 1)
        begin = min(starts, key=lambda start: sums[start + length] - sums[start])
        return range(begin, begin + length)

    def _vacate(self, stream: int, window: range) -> bool:
        """Moves who is in a stream to a free one far outside the window, if there is one."""
        slot = self._slot_in.get(stream)
        if slot is None:
            return True
        free = [other for other in self._free() if other not in window]
        if free:
            self._move(slot, max(free, key=lambda other: abs(2 * other - window[0] - window[-1])))
        return bool(free)

    def _move(self, slot: int, stream: int) -> None:
        """Puts a slot in a free stream, with what it has in the cache."""
        former = self._stream_of.get(slot)
        self._settle(slot, stream)
        if former is not None:
            del self._slot_in[former]
            self._cells.copy(former, stream)
            self._cells.drop(former)

    def _settle(self, slot: int, stream: int) -> None:
        assert stream not in self._slot_in, "a stream has one slot"
        self._stream_of[slot] = stream
        self._slot_in[stream] = slot

    def _free(self) -> list[int]:
        return [stream for stream in range(self._count) if stream not in self._slot_in]
