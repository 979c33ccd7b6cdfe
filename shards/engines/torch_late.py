"""Tokens that stay on the device, and are read when the next step is under way there already.

A device that has to wait until the host has read the tokens, told them, and made the next step of
them stands still for a good part of each step (Llama 1B on an H100, 64 rows: 1.0 of 3.3 ms).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.sampling import NOT_FINITE, Drawn


class Fetch:
    """A tensor on its way to the host. Nothing that is computed after it holds it up."""

    def __init__(self, tensor: Any) -> None:
        self._copied: Any = None
        if tensor.device.type != "cuda":
            self._here = tensor.cpu()
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._here.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
        self._copied.record()

    @property
    def done(self) -> bool:
        """Whether it has arrived."""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Waits until it has; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def numpy(self) -> NDArray[Any]:
        """Waits, and gives what has arrived."""
        self.wait()
        array: NDArray[Any] = self._here.numpy()
        return array


class Greedy:
    """The likeliest token of each row of logits [rows, vocabulary], smaller ids first: a drawing.

    ``tokens`` are on the device, [rows] of int64; 0 where the logits are not finite.
    """

    sure = True

    def __init__(self, logits: Any) -> None:
        with torch.inference_mode():
            best = logits.argmax(dim=-1, keepdim=True)
            # NaN counts as the largest value, so the largest tells.
            told = torch.where(torch.isfinite(logits.gather(-1, best)), best, -1)[:, 0]
            self.tokens = told.clamp(min=0)
            self._fetch = Fetch(told)

    @property
    def done(self) -> bool:
        """See ``Drawing``."""
        return self._fetch.done

    def wait(self) -> None:
        """See ``Drawing``."""
        self._fetch.wait()

    def take(self) -> Drawn:
        """See ``Drawing``."""
        tokens: list[int] = self._fetch.numpy().tolist()
        failures = {index: NOT_FINITE for index, token in enumerate(tokens) if token < 0}
        return Drawn([max(token, 0) for token in tokens], failures=failures)


class Late:
    """The tokens of the last drawing, where a captured step can read them: always in one place."""

    def __init__(self, rows_max: int, device: torch.device) -> None:
        self._tokens = torch.zeros(rows_max, dtype=torch.int64, device=device)

    def keep(self, tokens: Any) -> None:
        """Keeps the tokens of a drawing, [rows]."""
        self._tokens[: len(tokens)].copy_(tokens)

    def known(self, tokens: Any) -> Any:
        """Tokens of a step, with those in their places that ``caller.late`` stands for."""
        rows = (-1 - tokens).clamp(min=0)
        return torch.where(tokens < 0, self._tokens[rows], tokens)


def any_late(tokens: NDArray[np.int32]) -> bool:
    """Whether a step has tokens that the host does not know yet."""
    return bool((tokens < 0).any())
