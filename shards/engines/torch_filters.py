"""Filters and draws over rows of logits, in operations that every device of torch has.

What is kept, and which token a number in [0, 1) picks, is as in ``shards.filters`` and
``shards.sampling``. Sums are of whole numbers, so that they do not depend on the order in which a
device adds, nor on the shape of a batch. Nothing here waits for the device.
"""

from typing import Any, NamedTuple

import torch

_BLOCK = 256
# Shares of a mass have 53 bits, in two parts.
_SHARE_BITS, _LOW_BITS = 53, 31
_LOW = (1 << _LOW_BITS) - 1

Share = tuple[Any, Any]
"""A share of a mass, by its upper 22 bits and its lower 31: two of int64 [rows, 1]."""


class Cut(NamedTuple):
    """What rows are drawn by, each [rows, 1]; reals are float32.

    ``top_k`` is the size of the vocabulary where it is off, ``filtered`` whether it is on.
    ``spare`` is the share that top_p leaves out.
    """

    temperature: Any
    top_k: Any
    filtered: Any
    spare: Share
    min_p: Any
    chance: Share


def weigh(logits: Any, peak: Any, temperature: Any = None) -> Any:
    """Probabilities up to a factor, of float32 logits; the likeliest token weighs 1.

    No temperature is 1. Each number is computed by itself, as in ``shards.sampling``.
    """
    weights = logits - peak
    if temperature is not None:
        weights /= temperature
    return weights.exp_()


def units(weights: Any, bits: int) -> Any:
    """Weights, 0 to 1, in whole units of 2 to the power of -``bits``, cut off: int64."""
    return (weights * 2.0**bits).long()


def portion(total: Any, share: tuple[Any, Any]) -> Any:
    """The product of a mass, at most 2^62, and a share of 53 bits, cut off, and exact until then.

    All are int64 [rows, 1]; a share is its upper bits and its lower 31.
    """
    upper, lower = share
    high, low = total >> _LOW_BITS, total & _LOW
    middle = upper * low + lower * high + (lower * low >> _LOW_BITS)
    return (upper * high << 2 * _LOW_BITS - _SHARE_BITS) + (middle >> _SHARE_BITS - _LOW_BITS)


def invert(weights: Any, bits: int, chance: tuple[Any, Any]) -> Any:
    """The first place where the sum of weights [rows, any] exceeds that share of all: [rows, 1].

    In two levels, by blocks, so that whole rows are added up and not accumulated. Places are kept
    within bounds, as weights that are no numbers may give any sum.
    """
    rows, count = weights.shape
    blocks = -(-count // _BLOCK)
    table = torch.zeros((rows, blocks * _BLOCK), dtype=torch.int64, device=weights.device)
    table[:, :count] = weights * 2.0**bits
    table = table.view(rows, blocks, _BLOCK)
    sums = table.sum(dim=-1)
    mass = sums.cumsum(dim=-1)
    wanted = portion(mass[:, -1:], chance)
    block = (mass <= wanted).sum(dim=-1, keepdim=True).clamp_(max=blocks - 1)
    wanted = wanted - mass.gather(1, block) + sums.gather(1, block)
    inner = table.take_along_dim(block[:, :, None], dim=1)[:, 0].cumsum(dim=-1)
    place = (inner <= wanted).sum(dim=-1, keepdim=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + place).clamp_(max=count - 1)


def parts(share: float) -> tuple[int, int]:
    """A share, 0 to 1, as two numbers of which ``Share`` is made."""
    return divmod(int(share * 2.0**_SHARE_BITS), 1 << _LOW_BITS)


class Near:
    """The ``width`` likeliest tokens of each row, or all, in the order of their ids and in falling.

    Which of equal tokens at the end are among them is up to the device.
    """

    def __init__(self, raw: Any, width: int) -> None:
        self.complete = width == raw.shape[1]
        self._ids = None
        if not self.complete:
            self._ids = raw.topk(width, sorted=False).indices.sort(dim=-1).values
            raw = raw.gather(1, self._ids)
        # Logits, and their places in the order of ids; of equal ones the smaller id first.
        self.falling, self.order = raw.sort(dim=-1, descending=True, stable=True)

    def ids(self, places: Any) -> Any:
        """Token ids of places [rows, any] in the order of ids."""
        return places if self._ids is None else self._ids.gather(1, places)

    def doubts(self, counts: Any) -> Any:
        """Whether the first ``counts`` [rows, 1] tokens may have equals that are not here."""
        width = self.falling.shape[1]
        last = self.falling.gather(1, counts.clamp(1, width) - 1)
        return (last == self.falling[:, -1:]) & (counts > 0) & (not self.complete)


def cut(near: Near, peak: Any, given: Cut, every: Any, bits: int) -> tuple[Any, Any]:
    """Tokens that are drawn behind top_k, top_p and min_p, and where ``near`` is too little.

    ``every`` are the weights of all tokens; None: all rows have top_k, or ``near`` is complete.
    Both that are returned are [rows, 1].
    """
    falling = weigh(near.falling, peak, given.temperature)
    least = falling[:, -1:].clone()
    falling *= torch.arange(falling.shape[1], device=falling.device) < given.top_k
    mass = units(falling, bits).cumsum(dim=-1)
    whole = mass[:, -1:]
    if every is not None:
        every = units(every, bits).sum(dim=-1, keepdim=True)
        whole = torch.where(given.filtered, whole, every)
    spare = portion(whole, given.spare)
    # The last token that stays is the first behind which no more is left than may be left out.
    last = (whole - mass > spare).sum(dim=-1, keepdim=True).clamp_(max=falling.shape[1] - 1)
    border = falling.gather(1, last)
    weights = torch.empty_like(falling).scatter_(1, near.order, falling)
    equals = weights == border
    room = last + 1 - (falling > border).sum(dim=-1, keepdim=True)
    weights *= (weights > border) | (equals & (equals.cumsum(dim=-1) <= room))
    weights *= weights >= given.min_p
    token = near.ids(invert(weights, bits, given.chance))
    if near.complete:
        return token, torch.zeros_like(equals[:, :1])
    unfinished = (whole - mass[:, -1:] > spare) | (border == least)
    # Tokens farther down can only matter if they weigh anything.
    doubtful = torch.where(given.filtered, near.doubts(given.top_k), unfinished)
    return token, doubtful & (units(least, bits) > 0)
