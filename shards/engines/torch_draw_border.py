"""Where the borders of top_k and top_p lie in a row: the steps of ``torch_draw_kernel._draw``.

Each is a part of a Triton kernel, done by one program. Keys are int32 in the order of what they
stand for: logits, or weights.
"""

from typing import Any

import triton
import triton.language as tl

# Tokens of a row, and of a list, that one program has in its registers at once.
_TILE = tl.constexpr(8192)
_LISTED = tl.constexpr(4096)
# Buckets by weight take its upper bits, 32 to an octave. Buckets by logit have the same width each;
# in the last one, 44 temperatures below the likeliest, nothing weighs as much as a unit.
BUCKETS = tl.constexpr(2048)
_WEIGHT_BITS = tl.constexpr(18)
_PER_TEMPERATURE = tl.constexpr(46.5)
_ONE = tl.constexpr(0x3F800000)
_LOW = tl.constexpr((1 << 31) - 1)
LARGEST = tl.constexpr(0x7FFFFFFF)
LOWEST = tl.constexpr(1 - (1 << 63))


@triton.jit  # type: ignore[untyped-decorator]
def key_of(x: "Any") -> "Any":
    """An int32 in the order of float32 numbers, of which zeros are equal and NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    number = x == x  # noqa: PLR0124 - NaN is not
    return tl.where(number, bits ^ ((bits >> 31) & LARGEST), LARGEST)


@triton.jit  # type: ignore[untyped-decorator]
def units(weights: "Any", scale: "Any") -> "Any":
    """Weights in whole units, of which the likeliest token has ``scale``."""
    return (weights * scale).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def portion(total: "Any", share: "Any") -> "Any":
    """See ``torch_filters.portion``; ``share`` points to its two parts."""
    upper, lower = tl.load(share), tl.load(share + 1)
    high, low = total >> 31, total & _LOW
    middle = upper * low + lower * high + (lower * low >> 31)
    return (upper * high << 9) + (middle >> 22)


@triton.jit  # type: ignore[untyped-decorator]
def per_logit_of(temperature: "Any") -> "Any":
    """How many buckets there are to a difference of 1 between logits."""
    return tl.minimum(tl.div_rn(tl.full((), _PER_TEMPERATURE, tl.float32), temperature), 1e30)


@triton.jit  # type: ignore[untyped-decorator]
def below(x: "Any", peak: "Any", per_logit: "Any") -> "Any":
    """Buckets by logit."""
    return tl.minimum((peak - x) * per_logit, BUCKETS - 1.0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def light(weights: "Any") -> "Any":
    """Buckets by weight."""
    return tl.minimum((_ONE - weights.to(tl.int32, bitcast=True)) >> _WEIGHT_BITS, BUCKETS - 1)


@triton.jit  # type: ignore[untyped-decorator]
def bucket_of(buckets: "Any", needed: "Any") -> "Any":
    """The first bucket up to which there is what is needed, and how much there is before it."""
    place = tl.arange(0, BUCKETS)
    held = tl.load(buckets + place)
    reached = tl.cumsum(held, axis=0) < needed
    return tl.sum(reached.to(tl.int32), axis=0), tl.sum(tl.where(reached, held, 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def list_buckets(  # noqa: PLR0913, PLR0917
    logits: "Any",
    weights: "Any",
    keys: "Any",
    ids: "Any",
    vocab: "Any",
    peak: "Any",
    per_logit: "Any",
    filtered: "Any",
    first: "Any",
    last: "Any",
) -> "Any":
    """Lists the tokens of some buckets in the order of ids; returns how many they are."""
    count = 0
    for start in range(0, vocab, _TILE):
        at = start + tl.arange(0, _TILE)
        if filtered:
            x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            bucket, key = below(x, peak, per_logit), key_of(x)
        else:
            w = tl.load(weights + at, mask=at < vocab, other=0.0)
            bucket, key = light(w), w.to(tl.int32, bitcast=True)
        mine = ((at < vocab) & (bucket >= first) & (bucket <= last)).to(tl.int32)
        found = tl.sum(mine, axis=0)
        if found > 0:
            place = count + tl.cumsum(mine, axis=0) - 1
            tl.store(keys + place, key, mask=mine > 0)
            tl.store(ids + place, at, mask=mine > 0)
        count += found
    tl.debug_barrier()
    return count


@triton.jit  # type: ignore[untyped-decorator]
def amount(keys: "Any", count: "Any", least: "Any", scale: "Any", massed: tl.constexpr) -> "Any":
    """How many listed keys are ``least`` or more; their mass, if keys are weights."""
    total = tl.zeros((), tl.int64)
    for start in range(0, count, _LISTED):
        at = start + tl.arange(0, _LISTED)
        key = tl.load(keys + at, mask=at < count, other=0)
        there = (at < count) & (key.to(tl.int64) >= least)
        if massed:
            held = units(tl.where(there, key, 0).to(tl.float32, bitcast=True), scale)
        else:
            held = there.to(tl.int64)
        total += tl.sum(held, axis=0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def border_of(
    keys: "Any", count: "Any", needed: "Any", scale: "Any", massed: tl.constexpr
) -> "Any":
    """The largest key such that those from there on have what is needed."""
    low, high = tl.full((), LARGEST, tl.int64), -tl.full((), LARGEST, tl.int64) - 1
    for start in range(0, count, _LISTED):
        at = start + tl.arange(0, _LISTED)
        key = tl.load(keys + at, mask=at < count, other=0).to(tl.int64)
        low = tl.minimum(low, tl.min(tl.where(at < count, key, LARGEST), axis=0))
        high = tl.maximum(high, tl.max(tl.where(at < count, key, LOWEST), axis=0))
    while low < high:
        middle = low + (high - low + 1) // 2
        if amount(keys, count, middle, scale, massed) >= needed:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit  # type: ignore[untyped-decorator]
def nth(keys: "Any", ids: "Any", count: "Any", border: "Any", wanted: "Any") -> "Any":
    """The id of that one of the keys that equal ``border``, counted from 1."""
    before, found = tl.zeros((), tl.int64), tl.full((), -1, tl.int32)
    for start in range(0, count, _LISTED):
        at = start + tl.arange(0, _LISTED)
        equal = (at < count) & (tl.load(keys + at, mask=at < count, other=0) == border)
        rank = before + tl.cumsum(equal.to(tl.int64), axis=0)
        held = tl.load(ids + at, mask=at < count, other=-1)
        found = tl.maximum(found, tl.max(tl.where(equal & (rank <= wanted), held, -1), axis=0))
        before += tl.sum(equal.to(tl.int64), axis=0)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def list_weights(
    keys: "Any", ids: "Any", count: "Any", weights: "Any", border: "Any", end: "Any"
) -> None:
    """Puts weights in the place of logits, and -1 for what top_k leaves out."""
    tl.debug_barrier()
    for start in range(0, count, _LISTED):
        at = start + tl.arange(0, _LISTED)
        key = tl.load(keys + at, mask=at < count, other=0).to(tl.int64)
        held = tl.load(ids + at, mask=at < count, other=0)
        kept = (key > border) | ((key == border) & (held <= end))
        w = tl.load(weights + held, mask=at < count, other=0.0).to(tl.int32, bitcast=True)
        tl.store(keys + at, tl.where(kept, w, -1), mask=at < count)
    tl.debug_barrier()
