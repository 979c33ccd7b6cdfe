"""Histograms without locks, for numbers that one event loop counts."""

from bisect import bisect_left

SECONDS = tuple(0.000_15 * 1.5**step for step in range(35))
"""TGI's bounds: 0.15 ms to 146 s, each one and a half times the one before."""

TOKENS = tuple(2.0**step for step in range(18))
"""1 to 131,072 tokens."""

SEQUENCES = tuple(2.0**step for step in range(11))
"""1 to 1024 sequences."""


class Histogram:
    """Counts of observations below each bound; one call may count many equal observations."""

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.help_text = help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts ``times`` observations of the same value."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulated(self) -> list[tuple[str, float]]:
        """For each bound, its text and how many observations did not exceed it."""
        total, rows = 0, []
        for bound, number in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += number
            rows.append(("+Inf" if bound == float("inf") else f"{bound:.6g}", float(total)))
        return rows

    @property
    def sum(self) -> float:
        """Sum of all observed values."""
        return self._sum
