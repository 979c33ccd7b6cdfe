"""The step in which kernels of our own are tried before they serve a model."""

import numpy as np

from shards.kv import StepLayout

# Its sequences: tokens in the step, and all of them. More than a block of 64 keys, and both a chunk
# and a single token.
TRIED = ((5, 75), (1, 33))


def trial_step(page_tokens: int) -> StepLayout:
    """The trial's step; pages are numbered from 1, and those of a sequence backwards."""
    counts, lengths = (np.array(numbers, np.int32) for numbers in zip(*TRIED, strict=True))
    pages = -(-lengths // page_tokens)
    tables = np.zeros((len(TRIED), pages.max()), np.int32)
    for row, behind in enumerate(np.cumsum(pages)):
        tables[row, : pages[row]] = np.arange(behind, behind - pages[row], -1)
    places = [np.arange(length - count, length) for count, length in TRIED]
    cells = [
        table[place // page_tokens] * page_tokens + place % page_tokens
        for table, place in zip(tables, places, strict=True)
    ]
    return StepLayout(
        tokens=np.zeros(counts.sum(), np.int32),
        positions=np.concatenate(places).astype(np.int32),
        cells=np.concatenate(cells).astype(np.int32),
        starts=np.array([0, *np.cumsum(counts)], np.int32),
        lengths=lengths,
        tables=tables,
        draws=np.zeros(0, np.int32),
    )
