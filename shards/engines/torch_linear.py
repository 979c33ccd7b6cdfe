"""Linear layers that share their input, multiplied as one.

The projections to queries, keys and values read the same activations, as do the two halves of a
gated feed-forward network. As one matrix they are one kernel instead of two or three. The model's
own code still calls each layer by its name: the first computes all, the others take their part.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Kept:
    """Outputs that were computed but not asked for yet, and the input that they belong to.

    Not attributes of the module, because setting those goes through a dozen checks.
    """

    __slots__ = ("input", "outputs")

    def __init__(self) -> None:
        self.input: Any = None
        self.outputs: list[Any] = []


class Lead(nn.Module):  # type: ignore[misc]
    """The first of some layers; computes the outputs of all, and keeps those of the others."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        self.sizes = [one.weight.shape[0] for one in linears]
        weight = torch.cat([one.weight.data for one in linears])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if linears[0].bias is not None:
            bias = torch.cat([one.bias.data for one in linears])
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.kept = Kept()

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out of the first]."""
        out = functional.linear(x, self.weight, self.bias)
        first, *others = out.split_with_sizes(self.sizes, -1)
        self.kept.input, self.kept.outputs = x, others
        return first

    def take(self, place: int, x: Any) -> Any:
        """The output of another layer for the same input; computed again for any other input."""
        kept = self.kept
        if x is kept.input:
            out = kept.outputs[place - 1]
            if place == len(kept.outputs):
                kept.input, kept.outputs = None, []  # nothing is held longer than it is needed
            return out
        rows = slice(sum(self.sizes[:place]), sum(self.sizes[: place + 1]))
        bias = None if self.bias is None else self.bias[rows]
        return functional.linear(x, self.weight[rows], bias)


class Follower(nn.Module):  # type: ignore[misc]
    """One of the other layers."""

    def __init__(self, lead: Lead, place: int) -> None:
        super().__init__()
        self._lead = (lead,)  # inside of a tuple, so that the weight is not counted twice
        self._place = place

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out]."""
        return self._lead[0].take(self._place, x)


def fuse(model: Any) -> None:
    """Multiplies together what can be; the model computes the same as before, up to rounding."""
    for module in list(model.modules()):
        for names in _TOGETHER:
            linears = [getattr(module, name, None) for name in names]
            if not _alike(linears):
                continue
            lead = Lead(linears)
            setattr(module, names[0], lead)
            for place, name in enumerate(names[1:], start=1):
                setattr(module, name, Follower(lead, place))


def _alike(linears: list[Any]) -> bool:
    """Whether they are plain linear layers with inputs of one size."""
    if any(type(one) is not nn.Linear for one in linears):
        return False
    kinds = {(one.weight.shape[1], one.weight.dtype, one.bias is None) for one in linears}
    return len(kinds) == 1
