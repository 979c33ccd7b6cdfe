"""What a step looks like to a model's layers: which pages are read, by whom, behind which mask.

All layers of one kind see a step alike, so this is prepared once for each kind and step. It is
mostly work on small arrays of integers, on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.kv import TRASH, Ints, StepLayout

# Decoding sequences are padded to the longest of their group. A group is split where that saves so
# many cells; each group costs a few calls per layer, about as much as reading a hundred cells.
GROUP_CELLS = 1024
GROUPS_MAX = 4
# A prefix is read together if that spares so many cells.
SHARED_CELLS = 1024


@dataclass(frozen=True, slots=True)
class Kind:
    """What attention does in a layer, beside its shapes.

    ``window``: how many tokens back it looks, itself included; 0: all. ``softcap``: scores are
    softcap * tanh(scores / softcap); 0: as they are.
    """

    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Decodes:
    """Sequences with one token each. ``rows`` are their tokens in the batch, or None for all.

    ``pages`` is [sequences * pages of the longest]; ``begins`` [sequences] the positions of their
    first cells, ``lengths`` those behind the last token. ``mask`` is [sequences, 1, 1, cells], what
    is added to the scores, or None where the kernel attends, which needs none. ``prefix`` are pages
    that come before these in every one of the sequences.
    """

    rows: Any
    count: int
    pages: Any
    begins: Any
    lengths: Any
    mask: Any
    prefix: Any = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several tokens: ``start`` to ``end`` of the batch.

    ``pages`` is None if the sequence begins with them, so that all keys are in the batch.
    ``mask`` is [tokens, cells], or None where it would be the causal one.
    """

    start: int
    end: int
    pages: Any
    mask: Any


@dataclass(frozen=True, slots=True)
class View:
    """One step, for the layers of one kind."""

    decodes: Sequence[Decodes]
    chunks: Sequence[Chunk]


def pages_seen(lengths: Ints, window: int, page_tokens: int) -> tuple[Ints, Ints]:
    """First page that the last token of each sequence sees, and one behind the last."""
    last = -(-lengths // np.int32(page_tokens))
    if not window:
        return np.zeros_like(lengths), last
    return np.maximum(lengths - np.int32(window), 0) // np.int32(page_tokens), last


def page_table(tables: Ints, first: Ints, last: Ints, width: int) -> Ints:
    """Pages ``first`` to ``last`` of each row, filled up with ``TRASH``: [rows, width]."""
    at = first[:, None] + np.arange(width, dtype=np.int32)
    found = np.take_along_axis(tables, np.minimum(at, tables.shape[1] - 1), axis=1)
    return np.where(at < last[:, None], found, np.int32(TRASH))


def decode_mask(lengths: Any, begins: Any, cells: int, kind: Kind, dtype: Any) -> Any:
    """[rows, 1, 1, cells]: 0 where the last token of a row looks, else minus infinity.

    ``lengths`` and ``begins`` are those of ``Decodes``; the work is done where they are.
    """
    place = torch.arange(cells, device=lengths.device) + begins[:, None]
    barred = place >= lengths[:, None]
    if kind.window:
        barred |= place < (lengths - kind.window)[:, None]
    mask = torch.zeros(barred.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(barred, float("-inf"))[:, None, None, :]


def groups(widths: NDArray[np.intp], page_tokens: int) -> Iterator[NDArray[np.intp]]:
    """Splits rows into groups whose padding is worth less than a group of its own costs."""
    order = np.argsort(-widths, kind="stable")
    made = 1
    while len(order):
        ordered = widths[order]
        # Cells saved by ending the group before each row: those behind it are padded less.
        saved = (ordered[0] - ordered) * np.arange(len(order), 0, -1) * page_tokens
        cut = int(saved.argmax())
        if saved[cut] < GROUP_CELLS or made == GROUPS_MAX:
            yield np.sort(order)
            return
        yield np.sort(order[:cut])
        order, made = order[cut:], made + 1


def shared_prefixes(tables: Ints, page_tokens: int) -> list[tuple[NDArray[np.intp], int]]:
    """Groups of rows that begin with the same pages, and how many of these they have in common.

    Groups are disjoint, and each spares reading at least ``SHARED_CELLS`` cells again.
    """
    found: list[tuple[NDArray[np.intp], int]] = []
    left = np.arange(len(tables))
    while len(left) > 1:
        rows, common = _most_shared(tables, left)
        if (len(rows) - 1) * common * page_tokens < SHARED_CELLS:
            break
        found.append((rows, common))
        left = np.setdiff1d(left, rows)
    return found


def _most_shared(tables: Ints, rows: NDArray[np.intp]) -> tuple[NDArray[np.intp], int]:
    """Of some rows, those that spare most by reading their common pages together."""
    mine = tables[rows]
    same = (mine == mine[0]).all(axis=0) & (mine[0] != TRASH)
    common = len(same) if same.all() else int(same.argmin())
    best = (rows, common)
    if common == len(same):
        return best
    for page in np.unique(mine[:, common]):
        part = rows[mine[:, common] == page]
        if page != TRASH and 1 < len(part) < len(rows):
            inner = _most_shared(tables, part)
            if (len(inner[0]) - 1) * inner[1] > (len(best[0]) - 1) * best[1]:
                best = inner
    return best


class Viewer:
    """Makes views of steps on one device; ``masked`` says whether decodes need their masks."""

    def __init__(
        self, page_tokens: int, dtype: torch.dtype, device: torch.device, *, masked: bool
    ) -> None:
        self._page = page_tokens
        self._dtype = dtype
        self._device = device
        self._masked = masked

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array on the device; from pinned memory, so that nobody waits for the copy."""
        made = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return made
        return made.pin_memory().to(self._device, non_blocking=True)

    def view(self, layout: StepLayout, kind: Kind) -> View:
        """What the layers of one kind need of a step."""
        counts = np.diff(layout.starts)
        single = np.flatnonzero(counts == 1)
        several = np.flatnonzero(counts != 1)
        return View(
            list(self._decodes(layout, single, kind)) if len(single) else [],
            [self._chunk(layout, int(index), kind) for index in several],
        )

    def _decodes(self, layout: StepLayout, rows: NDArray[np.intp], kind: Kind) -> Iterator[Decodes]:
        """Sequences that share a long prefix read it together; the others are put side by side."""
        if self._device.type == "cpu" and kind == Kind():
            alone = np.ones(len(rows), np.bool_)
            for mine, common in shared_prefixes(layout.tables[rows], self._page):
                alone[mine] = False
                first = np.full(len(mine), common, np.int32)
                yield self._decode(layout, rows[mine], first, kind, common)
            rows = rows[alone]
        first, last = pages_seen(layout.lengths[rows], kind.window, self._page)
        if not self._masked:
            yield self._decode(layout, rows, first, kind)
            return
        for part in groups((last - first).astype(np.intp), self._page):
            yield self._decode(layout, rows[part], first[part], kind)

    def _decode(
        self, layout: StepLayout, rows: NDArray[np.intp], first: Ints, kind: Kind, common: int = 0
    ) -> Decodes:
        _, last = pages_seen(layout.lengths[rows], 0, self._page)
        width = int((last - first).max())
        table = page_table(layout.tables[rows], first, last, width)
        lengths = self.tensor(layout.lengths[rows])
        begins = self.tensor(first * np.int32(self._page))
        whole = len(rows) == len(layout.tokens)
        mask = None
        if self._masked:
            mask = decode_mask(lengths, begins, width * self._page, kind, self._dtype)
        return Decodes(
            None if whole else self.tensor(layout.starts[rows].astype(np.int64)),
            len(rows),
            self.tensor(table.reshape(-1)),
            begins,
            lengths,
            mask,
            self.tensor(layout.tables[rows[0], :common]) if common else None,
        )

    def _chunk(self, layout: StepLayout, index: int, kind: Kind) -> Chunk:
        start, end = int(layout.starts[index]), int(layout.starts[index + 1])
        length, count = int(layout.lengths[index]), end - start
        if count == length and not 0 < kind.window < length:
            return Chunk(start, end, None, None)
        if count == length:
            return Chunk(start, end, None, self._chunk_mask(0, 0, length, length, kind))
        before = length - count
        first = max(0, before + 1 - kind.window) // self._page if kind.window else 0
        last = -(-length // self._page)
        pages = self.tensor(layout.tables[index, first:last])
        cells = (last - first) * self._page
        mask = self._chunk_mask(before, first * self._page, count, cells, kind)
        return Chunk(start, end, pages, mask)

    def _chunk_mask(self, before: int, first: int, count: int, cells: int, kind: Kind) -> Any:
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        return causal_mask(before, first, count, cells, kind, like)


def causal_mask(before: int, first: int, count: int, cells: int, kind: Kind, like: Any) -> Any:
    """What is added to the scores of queries at ``before`` and on, keys at ``first`` and on.

    [count, cells], with the type and device of ``like``.
    """
    query = torch.arange(before, before + count, device=like.device)[:, None]
    key = torch.arange(first, first + cells, device=like.device)
    barred = key > query
    if kind.window:
        barred |= key <= query - kind.window
    mask = torch.zeros((count, cells), dtype=like.dtype, device=like.device)
    return mask.masked_fill_(barred, float("-inf"))
