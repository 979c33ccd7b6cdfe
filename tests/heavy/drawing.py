"""Rows to draw, and how near a device's draw must come to the host's; for all frameworks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shards.allowed import Guiding
from shards.engines.base import SamplingParams
from shards.residents import is_plain
from shards.sampling import Drawn, Sampler

# Rounding may exchange tokens with so little of the mass between them ...
SHARE_MAX = 1e-5
# ... in so many rows of a thousand; as both round to the last place of single precision.
EXCHANGED_PER_THOUSAND = 2


@dataclass
class Row:
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tokens: Sequence[int] = (5, 6, 7)
    prompt_len: int = 3
    guide: Guiding | None = None

    @property
    def plain(self) -> bool:
        return is_plain(self.sampling)


class Compared:
    """The host's sampler beside one that draws on a device, for one vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.host = Sampler(vocab_size, 1)

    def draw(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> Drawn:
        """On the device."""
        raise NotImplementedError

    def exchanged(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> int:
        """How many rows the device draws otherwise, by rounding; all else must be the same."""
        expected, seen = self.host.draw(logits, rows), self.draw(logits, rows)
        assert seen.failures == expected.failures
        assert seen.logprobs.keys() == expected.logprobs.keys()
        exchanged = 0
        for index, (token, wanted) in enumerate(zip(seen.tokens, expected.tokens, strict=True)):
            sampling = rows[index].sampling
            if token != wanted:
                exchanged += 1
                share = between(logits[index], sampling.temperature, token, wanted)
                assert share < SHARE_MAX, (token, wanted, sampling)
            elif index in expected.logprobs:
                told, other = seen.logprobs[index], expected.logprobs[index]
                assert list(told.top_tokens) == list(other.top_tokens), sampling
                assert told.rank == other.rank
                np.testing.assert_allclose(told.logprob, other.logprob, rtol=1e-6, atol=1e-5)
                np.testing.assert_allclose(told.top_values, other.top_values, rtol=1e-6, atol=1e-5)
        return exchanged

    def all_exchanged(
        self,
        random: np.random.Generator,
        size: int,
        count: int,
        spreads: Sequence[float],
        steps: Sequence[float] = (0.0,),
        **asked: object,
    ) -> tuple[int, int]:
        """``exchanged`` of ``count`` rows for each spread and step of logits; and of how many."""
        exchanged = rows = 0
        for spread in spreads:
            for step in steps:
                logits = random_logits(random, count, size, spread, step)
                exchanged += self.exchanged(logits, random_rows(random, count, **asked))
                rows += count
        return exchanged, rows


def between(logits: NDArray[np.float32], temperature: float, one: int, other: int) -> float:
    """The share of the mass that separates two tokens in the order of ids."""
    exact = logits.astype(np.float64)
    weights = np.exp((exact - exact.max()) / temperature)
    low, high = sorted((one, other))
    return float(weights[low:high].sum() / weights.sum())


def random_logits(
    random: np.random.Generator, rows: int, vocab_size: int, spread: float, step: float = 0.0
) -> NDArray[np.float32]:
    """Normal numbers, in multiples of ``step`` unless that is 0."""
    drawn = random.normal(0.0, spread, (rows, vocab_size))
    return (drawn if not step else np.round(drawn / step) * step).astype(np.float32)


def random_rows(random: np.random.Generator, count: int, **asked: object) -> list[Row]:
    """Rows that ask for the same, each with a seed and a length of its own."""
    lengths = random.integers(1, 300, count)
    seeds = random.integers(0, 1 << 62, count)
    return [
        Row(SamplingParams(seed=int(seed), **asked), range(length), 1)  # type: ignore[arg-type]
        for seed, length in zip(seeds, lengths, strict=True)
    ]


# Every kind of row that the device draws.
KINDS: dict[str, dict[str, object]] = {
    "greedy": {},
    "warm": {"temperature": 1.0},
    "cool": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "top_k of one": {"temperature": 1.0, "top_k": 1},
    "top_k of most": {"temperature": 2.0, "top_k": 1900},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "low top_p": {"temperature": 1.0, "top_p": 0.1},
    "high top_p": {"temperature": 1.0, "top_p": 0.999},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "all filters": {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "top_p and min_p": {"temperature": 1.2, "top_p": 0.98, "min_p": 0.01},
    "told": {"logprobs": True, "top_logprobs": 5, "ranks": True},
    "warm and told": {"temperature": 1.0, "logprobs": True, "ranks": True},
    "top_p and told": {"temperature": 0.7, "top_p": 0.9, "logprobs": True, "top_logprobs": 20},
}

# Those at the borders of what may be asked, for a vocabulary of 2,000.
VOCAB = 2000
BORDERS: dict[str, dict[str, object]] = {
    "top_p of all": {"temperature": 1.0, "top_p": 1.0},
    "top_p of nearly all": {"temperature": 1.0, "top_p": 1.0 - 2.0**-40},
    "top_p of one": {"temperature": 1.0, "top_p": 1e-12},
    "top_p off": {"temperature": 1.0, "top_p": 0.0},
    "top_k of all": {"temperature": 1.0, "top_k": VOCAB},
    "top_k of all but one": {"temperature": 1.0, "top_k": VOCAB - 1},
    "top_k of more than all": {"temperature": 1.0, "top_k": 100_000},
    "min_p of one": {"temperature": 1.0, "min_p": 1.0},
    "min_p above one": {"temperature": 1.0, "min_p": 2.0},
    "freezing": {"temperature": 1e-6},
    "nearly zero": {"temperature": 1e-44, "top_p": 0.9},
    "boiling": {"temperature": 1e6},
    "all told": {"temperature": 1.0, "logprobs": True, "top_logprobs": VOCAB},
    "more than all told": {"logprobs": True, "top_logprobs": 100_000, "ranks": True},
}
