"""Mutants of how answers wait for a group to go on in; see ``mutants.py``."""

from tests.sim.mutation import Mutant

STRANDED = [
    Mutant(
        "stranded.py",
        "self.since.get(sequence.id, now_ms)",
        "now_ms",
        "the clock of an answer that has no group never gets on",
    ),
    Mutant(
        "stranded.py",
        "        self.since = since\n",
        "        self.since |= since\n",
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
        "min(self.since.values())",
        "max(self.since.values())",
        "the timer is set for the last of those who wait",
    ),
    Mutant(
        "scheduler.py",
        "            due.append(self._stranded.due_ms())\n",
        "            pass\n",
        "the timer forgets those who wait for a group",
    ),
    Mutant(
        "waiting.py",
        "(*self.aside.values(), *members) if one.produced]",
        "(*self.aside.values(), *members)]",
        "requests that have shown nothing are given up, too",
    ),
    Mutant(
        "scheduler.py",
        "aside=bool(self._serving(model))",
        "aside=any(group.up.model == model for group in self._groups.values())",
        "a group that leaves counts as one to go on in",
    ),
    Mutant(
        "scheduler.py",
        "line.begun(aside=bool(self._serving(model)))",
        "line.begun(aside=False)",
        "an answer is given up although a group is up",
    ),
    Mutant(
        "scheduler.py",
        "line.begun(aside=bool(self._serving(model)))",
        "[] if self._serving(model) else line.begun(aside=False)",
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
        "for one in (*self.aside.values(), *members)",
        "for one in members",
        "who was set aside is forgotten when the last group goes",
    ),
    Mutant(
        "waiting.py",
        "return len(self.members) + len(self.aside)",
        "return len(self.members)",
        "who was set aside does not count as waiting",
    ),
    Mutant(
        "scheduler.py",
        "            if line.members or line.aside:\n",
        "            if line.members:\n",
        "who was set aside beside an empty line waits for ever",
    ),
    Mutant(
        "scheduler.py",
        "        if not begun and not self._stranded.since:\n",
        "        if not begun:\n",
        "the clock runs on when nobody has to wait any more",
    ),
    Mutant(
        "waiting.py",
        "        if self.aside.pop(request, None) is None:\n",
        "        if True:\n",
        "who was set aside cannot leave",
    ),
]
