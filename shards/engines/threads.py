"""How many threads an engine computes with, from what else the machine is doing.

Compute threads wait for each other at every operation, by spinning. When another program wants one
of their cores, every wait lasts until the scheduler gives that core back, and the engine slows down
by a factor of ten and more. One thread fewer costs its share of the speed and no more. So the count
follows the processor time that others use: down at once, and up again after one calm look. Where
that turns out to have been too early, each further attempt waits twice as long.
"""

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

# Time between two looks at the counters, in seconds. The kernel counts in hundredths.
LOOK_S = 0.4
# Others must leave this much of a core for one more thread, and take this much to cost one.
SPARE_UP = 0.75
SPARE_DOWN = 0.5
# Looks in a row that must agree before a thread is added: so many at most. One is enough unless the
# count had to go down within the steady looks after it had gone up; each time it did they double.
LOOKS_UP_MAX = 8
LOOKS_STEADY = 10

_STAT = Path("/proc/stat")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Load:
    """Processor time since the machine started, in seconds: everybody's, and this process's."""

    at_s: float
    busy_s: float
    own_s: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The thread count, and what the next one depends on, in looks.

    ``calm``: for how many a higher count has seemed right; ``steady``: since the count changed;
    ``patience``: how many must be calm before a thread is added.
    """

    threads: int
    calm: int = 0
    steady: int = LOOKS_STEADY
    patience: int = 1


def others(before: Load, after: Load) -> float:
    """How many cores other processes kept busy between two looks."""
    elapsed = after.at_s - before.at_s
    busy = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, busy / elapsed) if elapsed > 0 else 0.0


def choose(choice: Choice, cores: int, taken: float) -> Choice:
    """The next thread count when others keep ``taken`` cores busy; at least 1, at most ``cores``.

    Each thread needs a core that others leave free for more than half of the time. Going up needs
    a core that is free for most of the time. A program that starts and ends is busy for less than a
    second, and should not cost a thread for longer; one that is busy now and then should.
    """
    free = cores - taken
    down = max(1, min(cores, int(free + 1.0 - SPARE_DOWN)))
    up = max(1, min(cores, int(free + 1.0 - SPARE_UP)))
    steady = min(choice.steady + 1, LOOKS_STEADY)
    if down < choice.threads:
        early = choice.steady < LOOKS_STEADY
        patience = min(2 * choice.patience, LOOKS_UP_MAX) if early else 1
        return Choice(down, steady=0, patience=patience)
    if up <= choice.threads:
        return replace(choice, calm=0, steady=steady)
    if choice.calm + 1 < choice.patience:
        return replace(choice, calm=choice.calm + 1, steady=steady)
    return Choice(up, steady=0, patience=choice.patience)


class ThreadControl:
    """Says how many threads the next step gets. ``pinned`` > 0 fixes the count.

    The counters are read on a thread of its own, so that the first step after a pause already
    knows what the machine is doing: one step with a thread too many can take seconds.
    """

    def __init__(self, pinned: int = 0) -> None:
        self._cores = usable_cores()
        self._choice = Choice(pinned or self._cores)
        self._load = read_load()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if not pinned and self._cores > 1 and self._load is not None:
            self._thread = threading.Thread(target=self._watch, name="load", daemon=True)

    @property
    def threads(self) -> int:
        """The present count."""
        return self._choice.threads

    def start(self) -> None:
        """Begins to follow the load, unless the count is pinned or there is nothing to follow."""
        if self._thread is not None:
            self._thread.start()

    def look(self) -> None:
        """Reads the counters once and decides anew."""
        before, after = self._load, read_load()
        if before is not None and after is not None:
            self._choice = choose(self._choice, self._cores, others(before, after))
        self._load = after

    def close(self) -> None:
        """Stops following."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            self.look()


def usable_cores() -> int:
    """Processors that this process may use: its affinity, and its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def read_load() -> Load | None:
    """The counters now; None where the system has none (then the count stays as it is)."""
    try:
        with _STAT.open("rb") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    except (OSError, ValueError):
        return None
    ticks = user + nice + system + irq + softirq + steal
    return Load(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())
