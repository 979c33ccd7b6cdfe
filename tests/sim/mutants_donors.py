"""Mutants of how donors stay and go, and of which group is chosen; see ``mutants.py``."""

from tests.sim.mutation import Mutant

DONORS = [
    Mutant("placing.py", "    _thin_out(group)\n", "", "donors stay beyond what is worth keeping"),
    Mutant(
        "placing.py",
        "while len(donors := list(_evictable(group))) > 1 and most < sum(",
        "while len(donors := list(_evictable(group))) > 1 and -1 < sum(",
        "donors go though they are worth keeping",
    ),
    Mutant(
        "placing.py",
        "while len(donors := list(_evictable(group))) > 1 and most",
        "while len(donors := list(_evictable(group))) > 0 and most",
        "the latest donor goes, too, if it is long",
    ),
    Mutant(
        "placing.py",
        "        remove(group, donors[0])",
        "        remove(group, donors[-1])",
        "the latest donors go for older ones",
    ),
    Mutant(
        "placing.py",
        "            remove(group, donor)\n            continue\n",
        "            remove(group, donor)\n",
        "a donor goes, and one who runs beside it",
    ),
    Mutant(
        "placing.py",
        "if not (sequence.admitted and group.up.limits.shares_prefix and known and enough):",
        "if not (sequence.admitted and known and enough):",
        "donors are kept where nobody can share them",
    ),
    Mutant(
        "scheduler.py",
        "self.counters.prefix_hit_tokens += admit.share_len",
        "self.counters.prefix_hit_tokens += 1",
        "shared tokens are miscounted",
    ),
    Mutant(
        "scheduler.py",
        "self.counters.admitted_tokens += len(admit.tokens)",
        "self.counters.admitted_tokens += len(admit.tokens) - admit.share_len",
        "admitted tokens are miscounted",
    ),
    Mutant(
        "scheduler.py",
        "        self.counters.resumed += 1\n",
        "        self.counters.resumed += sequence.produced > 0\n",
        "those who had shown nothing do not count as started again",
    ),
    Mutant(
        "placing.py",
        "        reverse=True,\n",
        "",
        "a request goes where there is least of it and least room",
    ),
    Mutant(
        "placing.py",
        "(shareable(group, sequence, config)[0], group.ledger.free)",
        "(0, group.ledger.free)",
        "a request goes where there is most room, whoever has its start",
    ),
    Mutant(
        "placing.py",
        "(shareable(group, sequence, config)[0], group.ledger.free)",
        "(shareable(group, sequence, config)[0], 0)",
        "a request goes to the first group, however full that is",
    ),
    Mutant(
        "placing.py",
        "    if len(ready) < 2:\n",
        "    if ready:\n",
        "a request always goes to the first group with a place",
    ),
]
