"""The sampler of a device of JAX beside the host's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import EngineOptions
from shards.engines.jax_mesh import join
from shards.engines.jax_sampling import DeviceSampler
from shards.engines.jax_steps import Compiler
from shards.sampling import Drawn
from tests.heavy.drawing import Compared, Row


class Both(Compared):
    """The two samplers of one vocabulary. ``counts`` are numbers of rows that logits may have."""

    def __init__(self, vocab_size: int, counts: Sequence[int], device: str = "cpu") -> None:
        super().__init__(vocab_size)
        self.brought: list[int] = []
        self._counts = counts
        self._group = join(EngineOptions(Path("none"), "none", device=device))
        self.here = DeviceSampler(vocab_size, self.host, Compiler(self._group), counts)
        for job in self.here.jobs():
            job()
        assert self.here.fault == ""

    def draw(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> Drawn:
        """On the device, with rows of padding up to one of the counts."""
        count = next(count for count in self._counts if count >= len(rows))
        padded = np.pad(logits, ((0, count - len(rows)), (0, 0)))

        def bring(wanted: Sequence[int]) -> NDArray[np.float32]:
            self.brought.append(len(wanted))
            return np.ascontiguousarray(logits[list(wanted)])

        return self.here.draw(self._group.put(padded), rows, bring)
