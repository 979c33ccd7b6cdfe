"""Mutants of how answers wait for a group to go on in; see ``mutants.py``."""

from tests.sim.mutation import Mutant

STRANDED = [
    Mutant(
        "stranded.py",
        "self._since.get(sequence.id, now_ms)",
        "now_ms",
        "the clock of an answer that has no group never gets on",
    ),
    Mutant(
        "stranded.py",
        "        self._since = since\n",
        "        self._since |= since\n",
        "the clock runs on for an answer that has found a group",
    ),
    Mutant(
        "stranded.py",
        "+ self._timeout_ms <= now_ms]",
        "+ self._timeout_ms < now_ms]",
        "an answer is given up too late",
    ),
    Mutant(
        "stranded.py",
        "min(self._since.values())",
        "max(self._since.values())",
        "the timer is set for the last of those who wait",
    ),
    Mutant(
        "scheduler.py",
        "for at in (*answers, self._stranded.due_ms())",
        "for at in answers",
        "the timer forgets those who wait for a group",
    ),
    Mutant(
        "waiting.py",
        "self._members.values() if sequence.produced]",
        "self._members.values()]",
        "requests that have shown nothing are given up, too",
    ),
    Mutant(
        "scheduler.py",
        "for group in self._groups.values() if not group.leaving}",
        "for group in self._groups.values()}",
        "a group that leaves counts as one to go on in",
    ),
    Mutant(
        "scheduler.py",
        "for model, line in self._lines.items() if model not in served]",
        "for model, line in self._lines.items()]",
        "an answer is given up although a group is up",
    ),
]
