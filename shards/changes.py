"""What bias, penalties and min_tokens make of some logits; see ``shards.sampling``."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import SamplingParams
from shards.filters import Floats, Ids
from shards.tally import Tally

_MINUS_INF = np.float32(-np.inf)
_NOTHING: Ids = np.empty(0, np.intp)


class Change(NamedTuple):
    """New logits of some tokens of a row, each of which is there once."""

    ids: Ids
    before: Floats
    after: Floats


def penalises(sampling: SamplingParams) -> bool:
    """Whether it matters which tokens were generated."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )


def penalties(
    logits: Floats, places: Sequence[int], asked: Sequence[SamplingParams], tallies: Sequence[Tally]
) -> list[Change]:
    """What penalties make of the generated tokens of some rows of ``logits``, all rows at once.

    They concern so few tokens of each that to call numpy takes longer than what it then does. The
    other arguments are parallel: which row, what is asked of it, and what was generated.
    """
    counts = [len(tally.ids) for tally in tallies]
    ids: Ids = np.concatenate([tally.ids for tally in tallies])
    before = logits[np.repeat(places, counts), ids]
    repetition = np.array([sampling.repetition_penalty for sampling in asked], np.float32)
    frequency = np.array([sampling.frequency_penalty for sampling in asked])
    presence = np.array([sampling.presence_penalty for sampling in asked], np.float32)
    after = _penalised(
        before,
        np.repeat(repetition, counts),
        np.repeat(frequency, counts) * np.concatenate([tally.often for tally in tallies]),
        np.repeat(presence, counts),
    )
    changes, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        changes.append(Change(ids[part], before[part], after[part]))
        start += count
    return changes


def change_of(
    logits: Floats, sampling: SamplingParams, generated: int, tally: Tally | None
) -> Change:
    """All that is asked of one row with so many generated tokens; penalties if there is a tally."""
    biased = [token for token, _ in sampling.logit_bias]
    stops: list[int] = []
    if generated < sampling.min_tokens:
        stops = [token for token in sampling.stop_tokens if token < len(logits)]
    seen = _NOTHING if tally is None else tally.ids
    ids = np.unique(np.concatenate((seen, np.array(biased + stops, np.intp))))
    before = logits[ids]
    after = before.copy()
    if biased:
        bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        np.add.at(after, ids.searchsorted(biased), bias)
    if tally is not None:
        places = ids.searchsorted(seen)
        after[places] = _penalised(
            after[places],
            np.float32(sampling.repetition_penalty),
            sampling.frequency_penalty * tally.often,
            np.float32(sampling.presence_penalty),
        )
    if stops:
        after[ids.searchsorted(stops)] = _MINUS_INF
    return Change(ids, before, after)


def _penalised(
    seen: Floats,
    repetition: Floats | np.float32,
    frequency: NDArray[np.float64],
    presence: Floats | np.float32,
) -> Floats:
    """The logits of generated tokens, lowered: by a penalty for all, or one for each."""
    lowered = np.where(seen > 0, seen / repetition, seen * repetition)
    return lowered - frequency.astype(np.float32) - presence
