"""The machine's memory, which the ranks of a group share that run on it."""

import os

# How many ranks of the group run here, as launchers of ranks tell each of them; ours does, too.
RANKS_HERE = "LOCAL_WORLD_SIZE"


def memory_bytes() -> int:
    """This rank's part of the memory. Of ranks that were started one by one nobody knows."""
    told = os.environ.get(RANKS_HERE, "")
    ranks = int(told) if told.isascii() and told.isdigit() else 1
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, ranks)
