"""The sampler of a device of torch beside the host's."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shards.engines.torch_devices import ToHost
from shards.engines.torch_sampling import DeviceSampler
from shards.sampling import Drawn
from tests.heavy.drawing import Compared, Row


class Both(Compared):
    """The two samplers of one vocabulary."""

    def __init__(self, vocab_size: int, width: int = 1024, device: str = "cpu") -> None:
        super().__init__(vocab_size)
        self.uploads = 0
        self.brought: list[int] = []
        self._device = torch.device(device)
        self._to_host = ToHost()
        self.here = DeviceSampler(vocab_size, self.host, self._upload, self._bring, width)

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        self.uploads += 1
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _bring(self, logits: torch.Tensor) -> NDArray[np.float32]:
        self.brought.append(len(logits))
        return self._to_host(logits)

    def draw(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> Drawn:
        """On the device."""
        return self.here.draw(torch.from_numpy(logits).to(self._device), rows)
