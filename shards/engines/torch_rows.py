"""The rows that a device draws: which, what it must know of them, and what it says of them.

What it must know is one array that is uploaded for each step. All but the uniform number of the
next position stays the same over a sequence's life, so it is made once for each ``SamplingParams``.
To make it of 64 rows anew took half a millisecond a step.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import SamplingParams
from shards.engines.device_draw import parts, spare_share
from shards.sampling import Row, splitmix64

# Columns; numbers that are not whole go by the bits of their float32, shares in two parts.
AT, TOP_K, TOPS, SPARE, CHANCE, TEMPERATURE, MIN_P, COLUMNS = 0, 1, 2, 3, 5, 7, 8, 9
# Columns of what comes back, and of what comes back for rows with log probabilities.
TOKEN, STATE, PLAIN_END = range(3)
RANK, TOTAL, CHOSEN, PEAK, TOPS_START = range(2, 7)
# What becomes of a row.
SURE, DOUBTFUL, UNSOUND = range(3)
_SEED = AT  # in what is kept, where the row's place is not known yet
_KEPT_MAX = 1024
_MASK = (1 << 64) - 1
_SHIFTS = np.array((30, 27, 31, 11), np.uint64)
_GOLDEN, _FIRST, _SECOND = (
    np.array(factor, np.uint64)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
# Lower temperatures draw the same, and a device may take them for 0.
_COLDEST = float(np.finfo(np.float32).tiny)


class Draw(Enum):
    """How a token is found: the likeliest, from all tokens, or from those that a filter leaves."""

    BEST = "best"
    WHOLE = "whole"
    CUT = "cut"


class Kind(NamedTuple):
    """Rows that are computed alike; ``told`` says whether log probabilities are wanted."""

    draw: Draw
    told: bool


DRAWN, TOLD = Kind(Draw.BEST, told=False), Kind(Draw.BEST, told=True)  # if tokens are known


class Group(NamedTuple):
    """Rows of one kind, by their indices in the step.

    ``tops`` is how many likely tokens are told at most, ``ranks`` whether any row wants its rank.
    ``whole`` and ``min_p`` say whether any row needs the mass of all tokens, and min_p.
    """

    kind: Kind
    rows: list[int]
    tops: int
    ranks: bool
    whole: bool
    min_p: bool

    def columns(self) -> int:
        """How many numbers come back of each row."""
        return TOPS_START + 2 * self.tops if self.kind.told else PLAIN_END


class Packer:
    """Packs the rows of one vocabulary's steps."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._kept = np.empty((_KEPT_MAX, COLUMNS), np.int64)
        # By identity, as these have many fields; each is kept, so that its identity stays its own.
        self._places: dict[int, tuple[SamplingParams, int]] = {}

    def pack(self, rows: Sequence[Row], order: Sequence[int]) -> NDArray[np.int64]:
        """Some rows, by their indices: [len(order), COLUMNS]."""
        count = len(order)
        if len(self._places) + count > len(self._kept):
            self._places.clear()
            if count > len(self._kept):
                self._kept = np.empty((count, COLUMNS), np.int64)
        places = [self._place(rows[index].sampling) for index in order]
        packed: NDArray[np.int64] = self._kept[places]
        positions = np.array([len(rows[index].tokens) for index in order], np.uint64)
        chances = uniforms(packed[:, _SEED].view(np.uint64), positions).view(np.int64)
        packed[:, AT] = order
        packed[:, CHANCE], packed[:, CHANCE + 1] = chances >> 31, chances & (1 << 31) - 1
        return packed

    def _place(self, sampling: SamplingParams) -> int:
        known = self._places.get(id(sampling))
        if known is not None:
            return known[1]
        place = len(self._places)
        self._places[id(sampling)] = sampling, place
        row, temperature = self._kept[place], sampling.temperature
        row[_SEED] = np.array(splitmix64(sampling.seed & _MASK), np.uint64).view(np.int64)
        row[TOP_K] = sampling.top_k if 0 < sampling.top_k < self._vocab else self._vocab
        row[TOPS] = tops(sampling, self._vocab)
        row[SPARE : SPARE + 2] = parts(spare_share(sampling.top_p))
        warmth = max(temperature, _COLDEST) if temperature > 0.0 else 0.0
        row[TEMPERATURE:] = np.array((warmth, min(sampling.min_p, 1.0)), np.float32).view(np.int32)
        return place


def uniforms(mixed: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 53 bits of ``shards.sampling.uniform``, of seeds that splitmix64 has scattered."""
    value = (mixed ^ positions) + _GOLDEN
    value = (value ^ value >> _SHIFTS[0]) * _FIRST
    value = (value ^ value >> _SHIFTS[1]) * _SECOND
    bits: NDArray[np.uint64] = (value ^ value >> _SHIFTS[2]) >> _SHIFTS[3]
    return bits


def tops(sampling: SamplingParams, vocab_size: int) -> int:
    """How many likely tokens are told."""
    return min(sampling.top_logprobs, vocab_size) if sampling.logprobs else 0


def kind_of(sampling: SamplingParams, vocab_size: int) -> Kind:
    """How a row that is drawn on the device is computed."""
    if sampling.temperature <= 0.0:
        draw = Draw.BEST
    elif 0 < sampling.top_k < vocab_size or 0.0 < sampling.top_p < 1.0:
        draw = Draw.CUT
    else:
        draw = Draw.WHOLE
    return Kind(draw, sampling.logprobs)


def group_rows(
    rows: Sequence[Row],
    wanted: Sequence[int],
    vocab_size: int,
    width: int,
    most: int,
    kind: Kind | None = None,
) -> list[Group]:
    """Rows of a kind together, no more than ``most``. All are of one ``kind``, if it is given.

    ``width`` is how many likely tokens are at hand to be told.
    """
    kinds: dict[Kind, list[int]] = {}
    for index in wanted:
        mine = kind or kind_of(rows[index].sampling, vocab_size)
        kinds.setdefault(mine, []).append(index)
    groups = []
    for mine, members in kinds.items():
        for start in range(0, len(members), most):
            part = members[start : start + most]
            asked = [rows[index].sampling for index in part]
            groups.append(
                Group(
                    mine,
                    part,
                    tops=min(width, max(tops(one, vocab_size) for one in asked)),
                    ranks=any(one.ranks for one in asked),
                    whole=any(not 0 < one.top_k < vocab_size for one in asked),
                    min_p=any(one.min_p > 0.0 for one in asked),
                )
            )
    return groups
