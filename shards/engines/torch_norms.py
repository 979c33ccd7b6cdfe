"""Root mean square norms (arXiv:1910.07467) as one kernel each.

Modelling code spells them out: eight small kernels, which on a GPU cost a small model more time
than its matrices do. Only norms that compute what torch's own function does are replaced, which is
tried with numbers: Gemma's, for one, multiply by one plus the weight. On CPUs such
a kernel is one of our own, if any (``torch_native``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm

Kernel = Callable[[Any, Sequence[int], Any, float], Any]
"""As ``rms_norm``: numbers, the shape of a row, its weight, and epsilon."""

_TRIED_ROWS = 16
# Roundings of the two ways may differ in the last place of the type, not by more.
_ROUNDINGS = 2.5


class Norm(nn.Module):  # type: ignore[misc]
    """x / sqrt(mean(x²) + eps) * weight over the last dimension."""

    def __init__(self, weight: Any, eps: float, kernel: Kernel = rms_norm) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._kernel = kernel
        self._shape = (weight.shape[0],)

    def forward(self, x: Any) -> Any:
        """[..., width] to the same shape."""
        return self._kernel(x, self._shape, self.weight, self._eps)


def fuse_norms(model: Any, kernel: Kernel = rms_norm, multiple: int = 1) -> int:
    """Replaces the norms of a model that can be; returns how many.

    The kernel is for rows of a multiple of so many numbers.
    """
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RMSNorm")
    ]
    replaced = 0
    for parent, name, child in places:
        eps = getattr(child, "variance_epsilon", None)
        weight = getattr(child, "weight", None)
        if eps is None or weight is None or weight.dim() != 1 or len(weight) % multiple:
            continue
        made = Norm(weight, float(eps), kernel)
        if _same(child, made, weight):
            setattr(parent, name, made)
            replaced += 1
    return replaced


def _same(before: Any, after: Any, weight: Any) -> bool:
    """Whether two norms compute the same of random numbers, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((_TRIED_ROWS, weight.shape[0]), generator=generator)
    x = drawn.to(device=weight.device, dtype=weight.dtype)
    with torch.inference_mode():
        expected, seen = before(x).float(), after(x).float()
    allowed = _ROUNDINGS * torch.finfo(weight.dtype).eps
    return bool(torch.allclose(seen, expected, rtol=allowed, atol=allowed))
