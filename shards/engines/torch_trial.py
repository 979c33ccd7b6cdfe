"""Tries, when a model is loaded, whether a device of torch draws the tokens that the host draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shards.engines import draw_trial
from shards.engines.torch_sampling import DeviceSampler
from shards.filters import Floats
from shards.sampling import Drawn, Row, Sampler


def trouble(
    here: DeviceSampler, host: Sampler, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Why a device cannot be trusted to draw, in one line; empty if it can.

    ``here`` draws on the ``device``, of logits of the type ``dtype``; ``host`` is what it must
    equal.
    """

    def placed(logits: Floats) -> Any:
        return torch.from_numpy(logits).to(device=device, dtype=dtype)

    def draw(logits: Floats, rows: Sequence[Row]) -> Drawn:
        return here.draw(placed(logits), rows)

    def rounded(logits: Floats) -> Floats:
        found: Floats = placed(logits).float().cpu().numpy()
        return np.ascontiguousarray(found)

    return draw_trial.trouble(draw, host, vocab_size, rounded)
