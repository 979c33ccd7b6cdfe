"""How often each token was generated: what penalties count, kept from one step to the next.

To count anew at each step would cost more than the rest of the sampler once a text is long.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_ROOM = 64


class Counted(Protocol):
    """A sequence whose tokens only ever grow in number."""

    @property
    def tokens(self) -> Sequence[int]:
        """All tokens so far."""

    @property
    def prompt_len(self) -> int:
        """How many of them are prompt."""


class Tally:
    """The generated tokens of one sequence, each once, and how often each came."""

    def __init__(self, row: Counted) -> None:
        self.row = row
        self._seen = row.prompt_len
        self._places: dict[int, int] = {}
        self._ids: NDArray[np.intp] = np.empty(_ROOM, np.intp)
        self._often: NDArray[np.float64] = np.empty(_ROOM)

    @property
    def ids(self) -> NDArray[np.intp]:
        """The tokens, in the order in which they first came; valid until the next count."""
        return self._ids[: len(self._places)]

    @property
    def often(self) -> NDArray[np.float64]:
        """How often each of ``ids`` came."""
        return self._often[: len(self._places)]

    def count(self) -> None:
        """Counts the tokens that came since the last time."""
        for token in self.row.tokens[self._seen :]:
            place = self._places.get(token)
            if place is None:
                place = self._add(token)
            self._often[place] += 1.0
        self._seen = len(self.row.tokens)

    def _add(self, token: int) -> int:
        place = self._places[token] = len(self._places)
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, self._ids))
            self._often = np.concatenate((self._often, self._often))
        self._ids[place], self._often[place] = token, 0.0
        return place


class Tallies:
    """The tallies of the sequences of the last draw. A sequence that left it is counted anew."""

    def __init__(self) -> None:
        self._kept: dict[int, Tally] = {}
        self._former: dict[int, Tally] = {}

    def turn(self) -> None:
        """Begins a draw: who was not in the last one is forgotten."""
        self._former, self._kept = self._kept, {}

    def of(self, row: Counted) -> Tally:
        """The tally of a sequence, up to date."""
        # A tally holds its row, so no other one has its identity.
        tally = self._former.get(id(row)) or Tally(row)
        self._kept[id(row)] = tally
        tally.count()
        return tally
