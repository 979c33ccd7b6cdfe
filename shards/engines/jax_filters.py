"""Filters and draws over rows of logits in JAX, for programs of fixed shapes.

What is kept, and which token a number in [0, 1) picks, is as in ``shards.filters`` and
``shards.sampling``. Sums are of whole numbers, so that they do not depend on the order in which a
device adds, nor on the shape of a batch; they need 64 bits, see ``jax.enable_x64``.

Nothing is sorted: to sort a vocabulary takes a device many times longer than to read it. The
smallest logit or weight that stays is found by its bits, two at a time, from sums over all that is
not less than a candidate. The number of turns is no data.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from shards.engines.device_draw import LOW_BITS, SHARE_BITS

# Logits that are worked on at once: 32 MiB, and a few times that of scratch.
AT_ONCE = 1 << 23
_BLOCK = 256
_LOW = (1 << LOW_BITS) - 1
_LOWEST = -(1 << 31)
# A weight is at most 1, whose bits these are enough for.
_WEIGHT_BITS = 30
_DIGIT = 2

Share = tuple[Array, Array]


class Asked(NamedTuple):
    """What rows are drawn by, each [rows, 1]; reals are float32, the others int32.

    ``top_k`` is the size of the vocabulary where it is off, ``spare`` the share that top_p leaves
    out. A share is its upper and its lower bits, see ``device_draw.parts``.
    """

    top_k: Array
    spare: Share
    chance: Share
    temperature: Array
    min_p: Array

    @classmethod
    def of(cls, given: Array) -> "Asked":
        """From int32 [rows, 7], where reals go by their bits; the order is that of the fields."""
        top_k, spare, low, chance, lower, temperature, min_p = jnp.split(given, 7, axis=1)
        reals = (lax.bitcast_convert_type(one, jnp.float32) for one in (temperature, min_p))
        return cls(top_k, (spare, low), (chance, lower), *reals)


class Filters(NamedTuple):
    """Which filters any row has: what none has need not be computed."""

    top_k: bool
    top_p: bool


def draw(logits: Array, given: Array, bits: int, filters: Filters) -> Array:
    """Draws a token of each row of float32 logits; int32 [rows, 7] comes back.

    The columns: the token, the bits of the largest logit (the row is unsound if it is not finite)
    and of the token's, its rank, and the sum of all weights at temperature 1 in units of 2 to the
    power of -``bits``, by its upper and its lower 32 bits.
    """
    asked = Asked.of(given)
    peak = jnp.max(logits, axis=1, keepdims=True)
    greedy = asked.temperature <= 0.0
    weights = jnp.exp((logits - peak) / jnp.where(greedy, 1.0, asked.temperature))
    if filters.top_k:
        top_k = asked.top_k.astype(jnp.int64)
        weights = jnp.where(_largest(_ordered(logits), None, top_k), weights, 0.0)
    if filters.top_p:
        masses = _units(weights, bits)
        whole = jnp.sum(masses, axis=1, keepdims=True)
        wanted = whole - _portion(whole, asked.spare)
        weights = jnp.where(_largest(_bits(weights), masses, wanted), weights, 0.0)
    masses = _units(jnp.where(weights >= asked.min_p, weights, 0.0), bits)
    drawn = _first_beyond(masses, lambda total: _portion(total, asked.chance))
    best = jnp.argmax(logits, axis=1, keepdims=True).astype(jnp.int32)
    token = jnp.where(greedy, best, drawn)
    total = jnp.sum(_units(jnp.exp(logits - peak), bits), axis=1, keepdims=True)
    chosen = jnp.take_along_axis(logits, token, axis=1)
    rank = jnp.sum(logits > chosen, axis=1, keepdims=True, dtype=jnp.int32) + 1
    halves = (total >> 32).astype(jnp.int32), total.astype(jnp.uint32)
    columns = (token, _bits(peak), _bits(chosen), rank, halves[0], _signed(halves[1]))
    return jnp.concatenate(columns, axis=1)


def tops(logits: Array, count: int) -> Array:
    """The likeliest tokens, smaller ids first among equals: int32 [rows, 2 * ``count``].

    Their ids, then the bits of their logits.
    """
    keys = _ordered(logits)
    places = lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def next_one(last: Array, _: None) -> tuple[Array, Array]:
        # One number by which tokens are ordered: no two are equal.
        ranked = (keys.astype(jnp.int64) << 32) + (_LOW - places)
        found = jnp.where(ranked < last, ranked, jnp.iinfo(jnp.int64).min)
        best = jnp.max(found, axis=1, keepdims=True)
        return best, best[:, 0]

    start = jnp.full((len(logits), 1), jnp.iinfo(jnp.int64).max, jnp.int64)
    _, found = lax.scan(next_one, start, None, length=count)
    ids = (_LOW - (found & _LOW)).astype(jnp.int32)
    return jnp.concatenate((ids, _unordered((found >> 32).astype(jnp.int32))), axis=0).T


def in_parts(function: Any, *arrays: Array) -> Array:
    """The function of rows, some rows at a time if there are too many logits in the first array."""
    rows, width = arrays[0].shape
    count = -(-rows * width // AT_ONCE)
    if count == 1 or rows == 1:
        found: Array = function(*arrays)
        return found
    each = -(-rows // count)
    count = -(-rows // each)
    spare = count * each - rows
    cut = [jnp.pad(one, ((0, spare), (0, 0))).reshape(count, each, one.shape[1]) for one in arrays]
    found = lax.map(lambda some: function(*some), tuple(cut))
    return found.reshape(count * each, -1)[:rows]


def _units(weights: Array, bits: int) -> Array:
    """Weights, 0 to 1, in whole units of 2 to the power of -``bits``, cut off: int64."""
    return (weights * jnp.float32(2.0**bits)).astype(jnp.int64)


def _portion(total: Array, share: Share) -> Array:
    """The product of a mass, at most 2^62, and a share, cut off, and exact until then: int64."""
    upper, lower = (part.astype(jnp.int64) for part in share)
    high, low = total >> LOW_BITS, total & _LOW
    middle = upper * low + lower * high + (lower * low >> LOW_BITS)
    return (upper * high << 2 * LOW_BITS - SHARE_BITS) + (middle >> SHARE_BITS - LOW_BITS)


def _largest(keys: Array, masses: Array | None, wanted: Array) -> Array:
    """Which tokens the fewest of the largest keys are that together have the wanted mass.

    Keys are int32, ``masses`` int64 of at least 1 where it matters, or None: each token counts 1
    and keys may be negative. Of equal keys the smaller ids are taken first.
    """
    width, start = (32, _LOWEST) if masses is None else (_WEIGHT_BITS, 0)

    def mass(which: Array) -> Array:
        if masses is None:
            return jnp.sum(which, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.int64)
        return jnp.sum(jnp.where(which, masses, 0), axis=1, keepdims=True)

    def digit(turn: Array, border: Array) -> Array:
        shift = width - _DIGIT - _DIGIT * turn.astype(jnp.int32)
        found = jnp.zeros_like(border)
        for value in range(1, 1 << _DIGIT):
            candidate = border + jnp.left_shift(jnp.int32(value), shift)
            found += (mass(keys >= candidate) >= wanted).astype(jnp.int32)
        return border + jnp.left_shift(found, shift)

    border = jnp.full((len(keys), 1), start, jnp.int32)
    border = lax.fori_loop(0, width // _DIGIT, digit, border)
    above, equal = keys > border, keys == border
    missing = wanted - mass(above)
    if masses is not None:
        each = jnp.max(jnp.where(equal, masses, 1), axis=1, keepdims=True)
        missing = -(-missing // jnp.maximum(each, 1))
    last = _first_beyond(equal.astype(jnp.int64), lambda _total: missing - 1)
    places = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    return above | (equal & (places <= last))


def _first_beyond(masses: Array, wanted_of: Any) -> Array:
    """The first place where the sum of masses [rows, any] exceeds what is wanted: int32 [rows, 1].

    What is wanted is a function of the sum of all. In two levels, by blocks, so that whole rows are
    added up and not accumulated. Places are kept within bounds: a row that is unsound may give any.
    """
    rows, count = masses.shape
    blocks = -(-count // _BLOCK)
    table = jnp.pad(masses, ((0, 0), (0, blocks * _BLOCK - count))).reshape(rows, blocks, _BLOCK)
    sums = jnp.sum(table, axis=2)
    mass = _accumulated(sums)
    wanted = wanted_of(mass[:, -1:])
    block = jnp.minimum(jnp.sum(mass <= wanted, axis=1, keepdims=True), blocks - 1)
    wanted = wanted - _at(mass, block) + _at(sums, block)
    inner = _accumulated(jnp.take_along_axis(table, block[:, :, None], axis=1)[:, 0])
    place = jnp.minimum(jnp.sum(inner <= wanted, axis=1, keepdims=True), _BLOCK - 1)
    return jnp.minimum(block * _BLOCK + place, count - 1).astype(jnp.int32)


def _accumulated(values: Array) -> Array:
    """Running sums of a few hundred values [rows, any], in one pass instead of many small ones."""
    width = values.shape[1]
    upto = jnp.arange(width)[:, None] >= jnp.arange(width)[None]
    return jnp.sum(jnp.where(upto[None], values[:, None, :], 0), axis=2)


def _at(values: Array, place: Array) -> Array:
    return jnp.take_along_axis(values, place, axis=1)


def _bits(reals: Array) -> Array:
    """Bits of float32 as int32. Those of numbers that are not negative have their order."""
    return lax.bitcast_convert_type(reals, jnp.int32)


def _signed(values: Array) -> Array:
    return lax.bitcast_convert_type(values, jnp.int32)


def _ordered(reals: Array) -> Array:
    """int32 in the order of float32, of whose two zeros there is one."""
    bits = _bits(jnp.where(reals == 0.0, jnp.float32(0.0), reals))
    return bits ^ ((bits >> 31) & jnp.int32(_LOW))


def _unordered(keys: Array) -> Array:
    """The bits of the float32 whose place that is."""
    return keys ^ ((keys >> 31) & jnp.int32(_LOW))
