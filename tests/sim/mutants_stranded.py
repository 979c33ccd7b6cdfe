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
        "lone = (self._stranded.due_ms(), self",
        "lone = (None, self",
        "the timer forgets those who wait for a group",
    ),
    Mutant(
        "waiting.py",
        "(*self._aside.values(), *members) if one.produced]",
        "(*self._aside.values(), *members)]",
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
        "line.begun(aside=model in served)",
        "line.begun(aside=False)",
        "an answer is given up although a group is up",
    ),
    Mutant(
        "scheduler.py",
        "line.begun(aside=model in served)",
        "[] if model in served else line.begun(aside=False)",
        "who was set aside beside a group of no use waits for ever",
    ),
    Mutant(
        "scheduler.py",
        "if refusal is None or head.produced:",
        "if refusal is None:",
        "an answer that has begun is refused while who could go on with it is away",
    ),
    Mutant(
        "scheduler.py",
        "if refusal is None or head.produced:",
        "if True:",
        "requests that nobody could begin with wait for who may come",
    ),
    Mutant(
        "scheduler.py",
        "                self._line_of(sequence).recall(sequence.id)\n",
        "                pass\n",
        "who was set aside is not thought of when a group comes up",
    ),
    Mutant(
        "waiting.py",
        "for one in (*self._aside.values(), *members)",
        "for one in members",
        "who was set aside is forgotten when the last group goes",
    ),
    Mutant(
        "waiting.py",
        "return len(self._members) + len(self._aside)",
        "return len(self._members)",
        "who was set aside does not count as waiting",
    ),
    Mutant(
        "waiting.py",
        "        if self._aside.pop(request, None) is None:\n",
        "        if True:\n",
        "who was set aside cannot leave",
    ),
]
