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
        "for sequence in self._members.values() if sequence.produced)",
        "for sequence in self._members.values())",
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
        "line.aside() if model in served else line.begun() for",
        "line.begun() for",
        "an answer is given up although a group is up",
    ),
    Mutant(
        "scheduler.py",
        "line.aside() if model in served else line.begun() for",
        "[] if model in served else line.begun() for",
        "who was set aside beside a group of no use waits for ever",
    ),
    Mutant(
        "scheduler.py",
        "if refusal is not None and head.produced:",
        "if False:",
        "an answer that has begun is refused while who could go on with it is away",
    ),
    Mutant(
        "scheduler.py",
        "if refusal is not None and head.produced:",
        "if refusal is not None:",
        "requests that nobody could begin with wait for who may come",
    ),
    Mutant(
        "scheduler.py",
        "            self._lines[event.model].recall()\n",
        "            pass\n",
        "who was set aside is not thought of when a group comes up",
    ),
    Mutant(
        "waiting.py",
        "return [*self.aside(), *members]",
        "return [*members]",
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
