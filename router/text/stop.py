"""Stop strings, found across token borders.

All stop strings of a request share one automaton (Aho and Corasick, "Efficient string matching",
CACM 1975): one dictionary look-up per character whatever their number, and the automaton's depth
is exactly the number of characters that may still turn out to be the start of a stop string.
"""

from collections import deque


class _Node:
    """A prefix of one or more stop strings. ``depth`` is its length in characters."""

    __slots__ = ("children", "depth", "fallback", "found")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.children: dict[str, _Node] = {}
        self.fallback: _Node | None = None  # the longest proper suffix that is a prefix too
        self.found = 0  # length of the longest stop string that ends here, 0 for none


def _automaton(stops: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            if char not in node.children:
                node.children[char] = _Node(node.depth + 1)
            node = node.children[char]
        node.found = len(stop)
    _link(root)
    return root


def _link(root: _Node) -> None:
    """Sets every fallback, breadth first, so that shorter prefixes are done before longer ones."""
    waiting = deque([root])
    while waiting:
        node = waiting.popleft()
        for char, child in node.children.items():
            child.fallback = root if node is root else _step(node.fallback, root, char)
            child.found = child.found or child.fallback.found
            waiting.append(child)


def _step(node: _Node | None, root: _Node, char: str) -> _Node:
    while node is not None:
        child = node.children.get(char)
        if child is not None:
            return child
        node = node.fallback
    return root


class StopMatcher:
    """Cuts a stream of text at the first stop string.

    The stop string that is complete first wins; of several that end at the same character, the
    longest. ``include_stop`` keeps it in the text. ``stops`` holds at least one string and no
    empty one. After a match ``matched`` is the stop string and nothing more may be pushed.
    """

    __slots__ = ("_firsts", "_held", "_include", "_node", "_root", "matched")

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._root = self._node = _automaton(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""
        self._include = include_stop
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Takes text, returns what is now certain to be no part of a stop string."""
        if not self._held and self._firsts.isdisjoint(text):
            return text
        node, root = self._node, self._root
        for index, char in enumerate(text):
            # Inline for speed: almost every character is answered by the first look-up.
            child = node.children.get(char)
            node = child if child is not None else _step(node.fallback, root, char)
            if node.found:
                return self._cut(self._held + text[: index + 1], node.found)
        self._node = node
        whole = self._held + text
        sure = len(whole) - node.depth
        self._held = whole[sure:]
        return whole[:sure]

    def flush(self) -> str:
        """Returns what was held back: no more text will come."""
        held, self._held, self._node = self._held, "", self._root
        return held

    def _cut(self, whole: str, length: int) -> str:
        self.matched = whole[-length:]
        self._held = ""
        return whole if self._include else whole[:-length]
