"""Mutants of how requests wait for groups that were up a moment ago; see ``mutants.py``.

Worlds hardly ever have several at one instant that fill up the places of those who wait: that they
count is held by ``tests/core/test_away.py``.
"""

from tests.sim.mutation import Mutant

AWAY = [
    Mutant(
        "away.py",
        "        if group.returns:\n",
        "        if True:\n",
        "a group that was taken away is waited for",
    ),
    Mutant(
        "away.py",
        "if until_ms <= now_ms]",
        "if until_ms < now_ms]",
        "a group that is away is waited for a millisecond too long",
    ),
    Mutant(
        "away.py",
        "now_ms + self._config.resume_timeout_ms",
        "now_ms + 2 * self._config.resume_timeout_ms",
        "a group that is away is waited for twice as long",
    ),
    Mutant(
        "away.py",
        "        self.groups.pop(name, None)\n",
        "        pass\n",
        "a group that is up again, or gone for good, still counts as away",
    ),
    Mutant(
        "away.py",
        "            del self.groups[name]\n",
        "            pass\n",
        "a group that is away for too long is waited for ever after",
    ),
    Mutant(
        "away.py",
        "        return bool(over)\n",
        "        return False\n",
        "nobody hears that a group has been away for too long",
    ),
    Mutant(
        "away.py",
        "return min(until_ms",
        "return max(until_ms",
        "the timer is set for the last of the groups that are away",
    ),
    Mutant(
        "away.py",
        "for _, group in self.groups.values() if group.up.model == model]",
        "for _, group in self.groups.values()]",
        "a request waits for a group that serves another model",
    ),
    Mutant(
        "scheduler.py",
        "return None if any(able(group, sequence) for group in expected) else refusal",
        "return refusal",
        "a request is refused although who could run it was up a moment ago",
    ),
    Mutant(
        "scheduler.py",
        "return None if any(able(group, sequence) for group in expected) else refusal",
        "return None if expected else refusal",
        "a request waits for a group that is of no use to it",
    ),
    Mutant(
        "scheduler.py",
        "if one.leaving and one.returns]",
        "if one.leaving]",
        "a request waits for a group that leaves for good",
    ),
    Mutant(
        "scheduler.py",
        "*(one for one in leaving if one.up.model == model)]",
        "]",
        "a request is refused while who could run it leaves for a moment",
    ),
    Mutant(
        "scheduler.py",
        "*(one for one in leaving if one.up.model == model)]",
        "*leaving]",
        "a request waits for a group that leaves, and serves another model",
    ),
    Mutant(
        "scheduler.py",
        "True, event.returns\n        self._regrouped = True\n",
        "True, event.returns\n",
        "nobody hears that a group that leaves will not come again",
    ),
    Mutant(
        "scheduler.py",
        "self._away.forget(event.group)\n                self._regrouped = True\n",
        "self._away.forget(event.group)\n",
        "nobody hears that a group is gone for good",
    ),
    Mutant(
        "scheduler.py",
        "self._away.forget(event.group)\n        self._regrouped = True\n",
        "self._away.forget(event.group)\n",
        "who waits for a group does not notice that it is up again",
    ),
    Mutant(
        "scheduler.py",
        "return 2 * aside >= self.config.requests_max",
        "return 2 * aside > self.config.requests_max",
        "one too many waits for a group that is away",
    ),
    Mutant(
        "scheduler.py",
        "return 2 * aside >= self.config.requests_max",
        "return False",
        "those who wait for a group that is away keep all others out",
    ),
    Mutant(
        "scheduler.py",
        "            elif not sequence.produced and (refusal",
        "            elif (refusal",
        "an answer that has begun is refused when its group is given up",
    ),
    Mutant(
        "scheduler.py",
        "                effects.append(self._close(sequence, refusal.reason, refusal.detail))\n",
        "                pass\n",
        "who waits in vain is not told",
    ),
    Mutant(
        "scheduler.py",
        "            due.append(self._away.due_ms())\n",
        "            pass\n",
        "the timer forgets the groups that are away",
    ),
    Mutant(
        "waiting.py",
        "return any(not sequence.produced for sequence in self.aside.values())",
        "return bool(self.aside)",
        "the timer is set for groups for which nobody waits",
    ),
]
