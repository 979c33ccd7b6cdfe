"""Steps cut to a few fixed shapes, so that everything is compiled before the first request.

A step's tokens are padded up to a bucket. How long sequences are, how many of them prefill, and
how much they share does not make a shape: the plain attention runs loops whose lengths are data,
and the kernel of the TPU does the same. So the number of buckets is small.

Only wide buckets are for tables up to some width, too. A GPU waits for its host at each turn of a
loop whose length is data, so there rows look at all pages of the bucket, whatever their lengths.

The arrays of one step travel to the device as a single vector of int32. This module needs no JAX.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from shards.kv import TRASH, Ints, StepLayout

DECODES = (1, 4, 8, 16, 32, 64, 128, 256)
# Padding costs as much as tokens do, on CPUs above all: a prompt of 32 beside 31 decodes is common.
MIXED = (32, 64, 128, 256, 512, 2048, 8192)
# Pages that the rows of a wide bucket look at. Each width is compiled for each number of rows.
WIDTHS = (16, 32, 64, 128, 256, 1024, 4096, 16384)
# Queries of one sequence that the plain attention computes together.
BLOCK = 64
# Pages of a sequence that it looks at together. A table has as many more at its end, so that such a
# piece may begin at any page.
PIECE = 8
# And pages of each of several sequences that it looks at together, at most ``PIECE``.
OWN_PIECE = 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape: tokens, sequences, and pages of a table. Only mixed steps have blocks.

    In a step that is not mixed, each sequence computes one token, so ``tokens == sequences``. Such
    a bucket may be ``wide``: all its pages are looked at.
    """

    tokens: int
    sequences: int
    pages: int
    mixed: bool
    wide: bool = False

    @property
    def blocks(self) -> int:
        """The most blocks that the sequences with several tokens can need."""
        return self.tokens // BLOCK + min(self.sequences, self.tokens // 2) if self.mixed else 0

    def fields(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of what is in the vector, in order.

        Sequences with one token come first, ``rows`` of them: token i belongs to sequence i. The
        first ``common`` pages are the same in all their tables. ``blocks`` has for each block its
        sequence, its first token and its number of tokens; ``counts`` are the numbers of rows,
        blocks, common pages and sequences. Tokens that are padding write to the trash page, and
        sequences that are padding have the length 1 there, so that all numbers stay finite.
        """
        tokens, sequences = (self.tokens,), (self.sequences,)
        return (
            ("counts", (4,)),
            ("tokens", tokens),
            ("positions", tokens),
            ("cells", tokens),
            ("starts", (self.sequences + 1,)),
            ("lengths", sequences),
            ("tables", (self.sequences, self.pages)),
            ("blocks", (self.blocks, 3)),
            ("draws", sequences),
        )

    @property
    def size(self) -> int:
        """Entries of the vector."""
        return sum(prod(shape) for _, shape in self.fields())

    def spans(self) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
        """Where in the vector each field is, and its shape."""
        start = 0
        for name, shape in self.fields():
            end = start + prod(shape)
            yield name, slice(start, end), shape
            start = end


@dataclass(frozen=True, slots=True)
class Buckets:
    """All shapes of one engine, smallest first."""

    decodes: tuple[Bucket, ...]
    mixed: tuple[Bucket, ...]

    def fit(self, layout: StepLayout) -> Bucket:
        """The smallest bucket that the step fits in."""
        tokens, sequences = len(layout.tokens), len(layout.lengths)
        pages = layout.tables.shape[1]
        for bucket in self.decodes if tokens == sequences else self.mixed:
            if tokens <= bucket.tokens and pages <= bucket.pages:
                return bucket
        raise AssertionError(f"{tokens} tokens of {sequences} sequences fit no bucket")

    @property
    def draw_counts(self) -> tuple[int, ...]:
        """For how many drawing sequences the logits are computed at once."""
        return tuple(sorted({bucket.sequences for bucket in self.decodes}))


def choose(
    sequences_max: int, step_tokens_max: int, pages: int, least: int = 1, *, wide: bool = False
) -> Buckets:
    """Buckets for an engine with these limits; ``pages`` is what the longest sequence needs.

    No bucket has fewer than ``least`` tokens. ``wide``: those that are not mixed are so.
    """
    spare = pages + PIECE
    widths = _steps(WIDTHS, pages) if wide else [spare]
    decodes = [
        Bucket(count, count, width, mixed=False, wide=wide)
        for count in _counts(min(sequences_max, step_tokens_max), least)
        for width in widths
    ]
    mixed = [
        Bucket(count, min(sequences_max, count), spare, mixed=True)
        for count in _steps(MIXED, step_tokens_max)
        if count > 1
    ]
    return Buckets(tuple(decodes), tuple(mixed))


def _steps(ladder: tuple[int, ...], most: int) -> list[int]:
    """The rungs below ``most``, and ``most`` itself."""
    return [*(rung for rung in ladder if rung < most), most]


def _counts(most: int, least: int) -> tuple[int, ...]:
    """Numbers of rows of the buckets for ``most`` sequences."""
    return tuple(count for count in _steps(DECODES, max(most, least)) if count >= least)


def ordered(layout: StepLayout, bucket: Bucket) -> StepLayout:
    """The step as the bucket wants it; what draws and scores keeps its order."""
    return _rows_first(layout) if bucket.mixed else layout


def pieces(indices: Ints, bucket: Bucket) -> Iterator[tuple[Ints, int]]:
    """Indices in vectors like the bucket's ``draws``, and how many of each are meant."""
    for start in range(0, len(indices), bucket.sequences):
        piece = indices[start : start + bucket.sequences]
        yield np.pad(piece, (0, bucket.sequences - len(piece))), len(piece)


def pack(layout: StepLayout, bucket: Bucket) -> Ints:
    """The step, ordered, as one vector; see ``Bucket.fields``."""
    layout = ordered(layout, bucket)
    sequences = len(layout.lengths)
    counts = np.diff(layout.starts)
    rows = int(np.count_nonzero(counts == 1))
    blocks = _blocks(layout.starts, rows)
    vector = nothing(bucket)
    at = {name: vector[span].reshape(shape) for name, span, shape in bucket.spans()}
    at["counts"][:] = rows, len(blocks), common_pages(layout.tables[:rows]), sequences
    at["starts"].fill(len(layout.tokens))
    for name in ("tokens", "positions", "cells", "starts", "lengths", "draws"):
        values = getattr(layout, name)
        at[name][: len(values)] = values
    at["tables"][:sequences, : layout.tables.shape[1]] = layout.tables
    at["blocks"][: len(blocks)] = blocks
    return vector


def nothing(bucket: Bucket) -> Ints:
    """The vector of a step that is all padding."""
    vector = np.zeros(bucket.size, np.int32)
    spans = {name: span for name, span, _ in bucket.spans()}
    vector[spans["tables"]] = TRASH
    vector[spans["lengths"]] = 1
    return vector


def _rows_first(layout: StepLayout) -> StepLayout:
    """The same step, the sequences with one token before the others; draws keep their order."""
    counts = np.diff(layout.starts)
    order = np.argsort(counts > 1, kind="stable")
    if (order[1:] > order[:-1]).all():
        return layout
    pieces = [np.arange(layout.starts[s], layout.starts[s + 1]) for s in order]
    tokens = np.concatenate(pieces)
    moved = np.empty_like(tokens)
    moved[tokens] = np.arange(len(tokens))
    return StepLayout(
        tokens=layout.tokens[tokens],
        positions=layout.positions[tokens],
        cells=layout.cells[tokens],
        starts=np.concatenate(([0], np.cumsum(counts[order]))).astype(np.int32),
        lengths=layout.lengths[order],
        tables=layout.tables[order],
        draws=moved[layout.draws].astype(np.int32),
        scores=moved[layout.scores].astype(np.int32),
    )


def _blocks(starts: Ints, rows: int) -> Ints:
    """Sequence, first token and number of tokens of each block of the sequences behind the rows."""
    found = [
        (sequence, start, min(BLOCK, int(starts[sequence + 1]) - start))
        for sequence in range(rows, len(starts) - 1)
        for start in range(int(starts[sequence]), int(starts[sequence + 1]), BLOCK)
    ]
    return np.array(found, np.int32).reshape(-1, 3)


def common_pages(tables: Ints) -> int:
    """How many pages at the start all these tables have in common; 0 for less than two tables.

    A page that is in two tables is whole and computed, so all its tokens may be looked at.
    """
    if len(tables) < 2:
        return 0
    same = (tables == tables[0]).all(axis=0) & (tables[0] != TRASH)
    return int(np.argmin(same)) if not same.all() else len(same)
