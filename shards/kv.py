"""Pages and block tables, for engines that own their KV cache.

Every rank builds the same tables from the same log: the pages to take are a function of the plans
alone, lowest number first. No block table ever travels.

``Residents`` has already refused what does not fit, so a page is always there when one is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from shards.prompt_logprobs import targets_of
from shards.residents import Resident

Ints = NDArray[np.int32]

TRASH = 0
"""Page that belongs to nobody: padding is written there, and unused table entries name it."""


class PageTables:
    """Which pages each resident sequence has, in order. Pages are numbered from 1."""

    def __init__(self, kv_tokens: int, page_tokens: int) -> None:
        assert kv_tokens % page_tokens == 0
        self.page_tokens = page_tokens
        self.page_count = kv_tokens // page_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets every sequence."""
        self._free = list(range(1, self.page_count + 1))
        self._holders = [0] * (self.page_count + 1)
        self._tables: dict[int, list[int]] = {}

    @property
    def used(self) -> int:
        """Pages that some sequence has."""
        return self.page_count - len(self._free)

    def table(self, sequence: int) -> Sequence[int]:
        """The pages of a sequence; empty before its first token is computed."""
        return self._tables.get(sequence, ())

    def share(self, donor: int, sequence: int, length: int) -> None:
        """Lets a new sequence start with the pages of the donor's first ``length`` tokens."""
        assert length % self.page_tokens == 0
        pages = self._tables[donor][: length // self.page_tokens]
        for page in pages:
            self._holders[page] += 1
        self._tables[sequence] = pages

    def extend(self, sequence: int, length: int) -> None:
        """Gives a sequence the pages that its first ``length`` tokens need."""
        table = self._tables.setdefault(sequence, [])
        while len(table) * self.page_tokens < length:
            page = heappop(self._free)
            self._holders[page] = 1
            table.append(page)

    def drop(self, sequence: int) -> None:
        """Takes a sequence's pages away; those that nobody else has become free."""
        for page in self._tables.pop(sequence, ()):
            self._holders[page] -= 1
            if not self._holders[page]:
                heappush(self._free, page)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The work of one step as flat arrays; T tokens of S sequences, laid out one after the other.

    ``tokens``, ``positions`` and ``cells`` have T entries; a cell is page * page_tokens + offset,
    where the keys and values of a token go. ``starts`` has S + 1: the tokens of sequence s are
    ``starts[s]`` to ``starts[s + 1]``. ``lengths`` has S: tokens of the sequence once the step is
    done, those of the step included. ``tables`` is [S, pages of the longest], filled up with
    ``TRASH``. ``draws`` has one index into T for each sequence that draws a token, ``scores`` one
    for each token of a prompt that is to be scored: where the token before it is.
    """

    tokens: Ints
    positions: Ints
    cells: Ints
    starts: Ints
    lengths: Ints
    tables: Ints
    draws: Ints
    scores: Ints = field(default_factory=lambda: np.empty(0, np.int32))


def lay_out(
    tables: PageTables, work: Sequence[tuple[Resident, int]], rows: Sequence[Resident]
) -> StepLayout:
    """Gives the work the pages that it needs, and lays it out. The rows that draw are in order."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, lengths, draws = [0], [], []
    scores: list[int] = []
    drawing = {id(row) for row in rows}
    for resident, count in work:
        start, end = resident.computed, resident.computed + count
        tables.extend(resident.sequence, end)
        if resident.sampling.prompt_logprobs:
            scores += range(len(tokens), len(tokens) + len(targets_of(resident, count)))
        tokens += resident.tokens[start:end]
        positions += range(start, end)
        starts.append(len(tokens))
        lengths.append(end)
        if id(resident) in drawing:
            draws.append(len(tokens) - 1)
    table = _table_of(tables, [resident.sequence for resident, _ in work])
    place = np.array(positions, np.int32)
    owner = np.repeat(np.arange(len(work)), np.diff(starts))
    pages = table[owner, place // tables.page_tokens]
    return StepLayout(
        tokens=np.array(tokens, np.int32),
        positions=place,
        cells=pages * np.int32(tables.page_tokens) + place % np.int32(tables.page_tokens),
        starts=np.array(starts, np.int32),
        lengths=np.array(lengths, np.int32),
        tables=table,
        draws=np.array(draws, np.int32),
        scores=np.array(scores, np.int32),
    )


def _table_of(tables: PageTables, sequences: Sequence[int]) -> Ints:
    """Block tables as one array, filled up with ``TRASH``."""
    lists = [tables.table(sequence) for sequence in sequences]
    out = np.full((len(lists), max(map(len, lists))), TRASH, np.int32)
    for index, pages in enumerate(lists):
        out[index, : len(pages)] = pages
    return out
