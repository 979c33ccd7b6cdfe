"""A radix tree over the tokens of resident sequences, to find who already holds a prompt's start.

The prompts of running sequences are in it from the moment they are placed, so that requests which
arrive together share too; the answers join when a sequence finishes. Edges are runs of tokens; a
sequence is listed in every node on its path, so the deepest node that a prompt reaches names those
who can donate that much.

What a token leaves in the cache depends on the adapter that it was computed with, so every adapter
has a root of its own and nothing is ever found across them.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Node:
    """The end of a run of tokens. ``depth`` counts the tokens from the root to its end."""

    edge: tuple[int, ...]
    depth: int
    parent: "_Node | None"
    children: dict[int, "_Node"] = field(default_factory=dict)
    holders: dict[int, None] = field(default_factory=dict)


class PrefixTree:
    """Which sequences hold which runs of tokens."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        self._ends: dict[int, _Node] = {}

    def __contains__(self, holder: int) -> bool:
        return holder in self._ends

    def insert(self, holder: int, tokens: Seq[int], adapter: str = "") -> None:
        """Lists the holder along its tokens, as computed with this adapter."""
        assert holder not in self._ends
        run = tuple(tokens)
        node = self._roots.setdefault(adapter, _Node((), 0, None))
        while node.depth < len(run):
            child = node.children.get(run[node.depth])
            if child is None:
                child = _Node(run[node.depth :], len(run), node)
                node.children[run[node.depth]] = child
            else:
                common = _common(child.edge, run, node.depth)
                if common < len(child.edge):
                    child = self._split(child, common)
            child.holders[holder] = None
            node = child
        self._ends[holder] = node

    def remove(self, holder: int) -> None:
        """Forgets the holder, and the runs that nobody else holds."""
        node: _Node | None = self._ends.pop(holder)
        while node is not None and node.parent is not None:
            node.holders.pop(holder)
            if not node.holders:
                assert not node.children
                del node.parent.children[node.edge[0]]
            node = node.parent

    def match(self, tokens: Seq[int], adapter: str = "") -> tuple[int, int | None]:
        """How many of the first tokens some holder with this adapter has, and who came first."""
        run = tuple(tokens)
        node, depth, holder = self._roots.get(adapter), 0, None
        while node is not None and depth < len(run):
            child = node.children.get(run[depth])
            if child is None:
                break
            holder = next(iter(child.holders))
            common = _common(child.edge, run, depth)
            depth += common
            if common < len(child.edge):
                break
            node = child
        return depth, holder

    def _split(self, lower: _Node, at: int) -> _Node:
        """Cuts an edge after ``at`` tokens; returns the new node at the cut."""
        parent = lower.parent
        assert parent is not None
        assert 0 < at < len(lower.edge)
        upper = _Node(lower.edge[:at], parent.depth + at, parent, holders=dict(lower.holders))
        parent.children[upper.edge[0]] = upper
        lower.edge, lower.parent = lower.edge[at:], upper
        upper.children[lower.edge[0]] = lower
        return upper


def _common(edge: tuple[int, ...], run: tuple[int, ...], start: int) -> int:
    """How many tokens of the edge continue the run from ``start`` on."""
    piece = run[start : start + len(edge)]
    if piece == edge:
        return len(edge)
    for index, (ours, theirs) in enumerate(zip(edge, piece, strict=False)):
        if ours != theirs:
            return index
    return min(len(edge), len(piece))
