"""Mutants of how groups leave; see ``mutants.py``.

Worlds hardly ever have one that shares and one that waits to share just when their group leaves:
what becomes of those is held by ``tests/core/test_leaving.py``.
"""

from tests.sim.mutation import Mutant

LEAVING = [
    Mutant(
        "scheduler.py",
        "event.epoch:\n            return []\n        group.leaving, group",
        "event.epoch and False:\n            return []\n        group.leaving, group",
        "a new life of a group leaves for what was told to the former",
    ),
    Mutant(
        "scheduler.py",
        "group.leaving, group.returns = True, event",
        "group.returns = event",
        "a group that is to go stays as it is",
    ),
    Mutant(
        "scheduler.py",
        "return self._turn_out(group) if event.at_once else []",
        "return self._turn_out(group)",
        "everybody has to go at once",
    ),
    Mutant(
        "scheduler.py",
        "return self._turn_out(group) if event.at_once else []",
        "return []",
        "nobody has to go at once",
    ),
    Mutant(
        "scheduler.py",
        "            if bound(sequence, self.config):\n",
        "            if False:\n",
        "an answer that may not be continued elsewhere is sent into line",
    ),
    Mutant(
        "scheduler.py",
        "                self._wait_again([*remove(group, sequence), sequence])",
        "                self._wait_again(remove(group, sequence))",
        "who has to go at once is forgotten",
    ),
    Mutant(
        "scheduler.py",
        "self.counters.moved += sequence.admitted",
        "self.counters.moved += 1",
        "those who had not begun count as moved when they have to go at once",
    ),
    Mutant(
        "scheduler.py",
        "                if group.leaving:\n                    self._move_on",
        "                if True:\n                    self._move_on",
        "whoever fits elsewhere moves there, all the time",
    ),
    Mutant(
        "scheduler.py",
        "                    self._move_on(group)\n",
        "                    pass\n",
        "nobody moves out of a group that leaves",
    ),
    Mutant(
        "scheduler.py",
        "if sequence.group is group and not bound(sequence, self.config):",
        "if sequence.group is group:",
        "an answer that may not be continued elsewhere moves",
    ),
    Mutant(
        "scheduler.py",
        "                    self.counters.moved += admitted\n",
        "                    self.counters.moved += 1\n",
        "those who had not begun count as moved",
    ),
    Mutant(
        "scheduler.py",
        "                    self._wait_again(displaced)\n",
        "",
        "those who were to share what moved are forgotten",
    ),
    Mutant(
        "scheduler.py",
        "if one.up.model == model and not one.leaving]",
        "if one.up.model == model]",
        "requests are placed in a group that leaves",
    ),
    Mutant(
        "leaving.py",
        "sequence.admitted and sequence.produced > 0 and not",
        "sequence.admitted and not",
        "one that has produced nothing yet may not move",
    ),
    Mutant(
        "leaving.py",
        "[*group.decoding.values(), *group.filling.values()]",
        "[*group.decoding.values()]",
        "who has produced nothing stays in a group that leaves",
    ),
    Mutant(
        "leaving.py",
        "[*group.decoding.values(), *group.filling.values()]",
        "[*group.filling.values()]",
        "who has produced something stays in a group that leaves",
    ),
    Mutant(
        "leaving.py",
        "for group in ranked(able, sequence, config) if has_room(group, sequence, config)",
        "for group in ranked(able, sequence, config)",
        "a sequence moves to where there is no room",
    ),
    Mutant(
        "leaving.py",
        "for group in ranked(able, sequence, config) if has_room(group, sequence, config)",
        "for group in ranked(able, sequence, config)[:1] if has_room(group, sequence, config)",
        "a sequence stays if the best of the groups has no room",
    ),
    Mutant(
        "leaving.py",
        "if group.left or group.in_flight:",
        "if group.left:",
        "a group may go before it has answered",
    ),
    Mutant(
        "scheduler.py",
        "            if group.leaving:\n                effects += tell_left(group)\n",
        "            if True:\n                effects += tell_left(group)\n",
        "every idle group may go",
    ),
    Mutant(
        "leaving.py",
        "if group.left or group.in_flight:",
        "if group.in_flight:",
        "it is said again and again that a group may go",
    ),
    Mutant(
        "placing.py",
        "    if not group.running:\n        return True\n    share_len, donor",
        "    share_len, donor",
        "an idle group has no room if it would have to give up what was to be shared",
    ),
    Mutant(
        "placing.py",
        "    return not full or any(donor.id != keep for donor in _evictable(group))",
        "    return not full",
        "a group full of donors has no room",
    ),
    Mutant(
        "placing.py",
        "    return not full or any(donor.id != keep for donor in _evictable(group))",
        "    return True",
        "a group has room without a place",
    ),
]
