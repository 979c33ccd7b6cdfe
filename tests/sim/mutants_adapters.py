"""Mutants of what concerns LoRA adapters; see ``mutants.py``."""

from tests.sim.mutation import Mutant

ADAPTERS = [
    Mutant(
        "prefix.py",
        "node = self._roots.setdefault(adapter, _Node((), 0, None))",
        'adapter = ""\n        node = self._roots.setdefault(adapter, _Node((), 0, None))',
        "what an adapter computed is offered to the model itself",
    ),
    Mutant(
        "placing.py",
        "group.tree.match(sequence.tokens, sequence.facts.adapter)",
        "group.tree.match(sequence.tokens)",
        "an adapter starts from what the model itself computed",
    ),
    Mutant(
        "placing.py",
        "group.tree.insert(sequence.id, sequence.tokens, sequence.facts.adapter)",
        "group.tree.insert(sequence.id, sequence.tokens)",
        "prompts under way are shared across adapters",
    ),
    Mutant(
        "placing.py",
        "group.tree.insert(sequence.id, known, sequence.facts.adapter)",
        "group.tree.insert(sequence.id, known)",
        "finished sequences are shared across adapters",
    ),
    Mutant(
        "placing.py",
        "return adapter if adapter and adapter not in group.up.adapters else None",
        "return None",
        "a sequence is placed where its adapter is not",
    ),
    Mutant(
        "refusing.py",
        "lacking = missing_feature(group, sequence) or missing_adapter(group, sequence)",
        "lacking = missing_feature(group, sequence)",
        "an unknown adapter is accepted",
    ),
    Mutant(
        "refusing.py",
        "groups = [group for group in groups if missing_adapter(group, sequence) is None]",
        "groups = groups",
        "a request for an unknown adapter is told that it is too long",
    ),
    Mutant(
        "planning.py",
        "                sequence.facts.adapter,\n",
        "",
        "the worker is not told of the adapter",
    ),
]
