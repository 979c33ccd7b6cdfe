"""The sampler of a device of torch beside the host's."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.engines import torch_filters, torch_rows
from shards.engines.device_draw import unit_bits
from shards.engines.torch_devices import ToHost
from shards.engines.torch_sampling import WIDTH, DeviceSampler
from shards.sampling import Drawn
from tests.heavy.drawing import Compared, Row

Kernel = Callable[[Any, Any], Any]


class Both(Compared):
    """The two samplers of one vocabulary."""

    def __init__(
        self, vocab_size: int, width: int = WIDTH, device: str = "cpu", kernel: Kernel | None = None
    ) -> None:
        super().__init__(vocab_size)
        self.uploads = 0
        self.brought: list[int] = []
        self._device = torch.device(device)
        self._to_host = ToHost()
        self.here = DeviceSampler(vocab_size, self.host, self._upload, self._bring, width, kernel)

    def _upload(self, array: NDArray[np.int64]) -> torch.Tensor:
        self.uploads += 1
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _bring(self, logits: torch.Tensor) -> NDArray[np.float32]:
        self.brought.append(len(logits))
        return self._to_host(logits)

    def draw(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> Drawn:
        """On the device."""
        return self.here.draw(torch.from_numpy(logits).to(self._device), rows)


def by_filters(vocab_size: int) -> Kernel:
    """What a kernel does, in operations of torch, of which none looks at few tokens first."""

    def draw(logits: Any, given: Any) -> Any:
        def column(at: int) -> Any:
            return given[:, at : at + 1]

        def real(at: int) -> Any:
            return column(at).int().view(torch.float32)

        def share(at: int) -> torch_filters.Share:
            return column(at), column(at + 1)

        raw = logits.index_select(0, given[:, torch_rows.AT]).float()
        best = raw.argmax(dim=-1, keepdim=True)
        peak, warmth, top_k = (
            raw.gather(1, best),
            real(torch_rows.TEMPERATURE),
            column(torch_rows.TOP_K),
        )
        asked = torch_filters.Cut(
            warmth,
            top_k,
            top_k < vocab_size,
            share(torch_rows.SPARE),
            real(torch_rows.MIN_P),
            share(torch_rows.CHANCE),
        )
        near = torch_filters.Near(raw, vocab_size)
        drawn, _doubtful = torch_filters.cut(near, peak, asked, None, unit_bits(vocab_size))
        sound = torch.isfinite(peak)
        token = torch.where(warmth > 0, drawn, best) * sound
        return torch.cat((token, torch.where(sound, torch_rows.SURE, torch_rows.UNSOUND)), dim=1)

    return draw
