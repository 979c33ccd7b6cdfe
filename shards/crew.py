"""A few threads that share out the rows of one step.

Numpy lets go of the interpreter's lock inside of its loops, but a row is many short calls, each of
which wants the lock back: two threads halve the time, more than four lose it again (64 rows of
128,256 logits on 16 cores; benchmarks/RESULTS.md, 2026-11-26).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from shards.engines.threads import usable_cores

THREADS_MAX = 4
# An engine's own threads have most of the cores; on few cores nothing is gained.
_CORES_EACH = 4
# Fewer rows are done before another thread has woken up.
ROWS_MIN = 4

Work = Callable[[int, Sequence[int]], None]
"""Does some rows as the member with that number; no two members work under one number at once."""


def default_threads() -> int:
    """How many threads are worth it on this machine, the caller's included."""
    return max(1, min(THREADS_MAX, usable_cores() // _CORES_EACH))


class Crew:
    """The caller's thread, which is member 0, and ``threads`` - 1 that help it."""

    def __init__(self, threads: int) -> None:
        assert threads >= 1
        self.threads = threads
        self._helpers = ThreadPoolExecutor(threads - 1, "crew") if threads > 1 else None

    def deal(self, work: Work, rows: Sequence[int], own: Sequence[int] = ()) -> None:
        """Has all rows done, those of ``own`` by the caller's thread, and returns when all are.

        Raises what ``work`` raised.
        """
        members = min(self.threads, len(rows) // ROWS_MIN)
        if self._helpers is None or members < 2:
            work(0, [*rows, *own])
            return
        parts = [rows[member::members] for member in range(members)]
        helped = [
            self._helpers.submit(work, member, part)
            for member, part in enumerate(parts[1:], start=1)
        ]
        try:
            work(0, [*parts[0], *own])
        finally:
            wait(helped)  # whatever happened, nobody works on these rows any longer
        for future in helped:
            future.result()

    def close(self) -> None:
        """Ends the threads; may be called again."""
        if self._helpers is not None:
            self._helpers.shutdown()
