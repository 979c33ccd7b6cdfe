"""Draws in three Triton kernels, for all rows of a step, whatever they ask for.

Nothing is sorted, nothing doubtful, and rows of all kinds go together. Tokens are the very ones of
``torch_filters``, as masses are whole numbers here, too. Needs Triton, which torch's builds for
GPUs bring. A row is cut into parts for the first two kernels:

1. ``_peaks`` finds the likeliest token of each part.
2. ``_weigh`` computes weights and the mass of each part. Where top_k or top_p is on, tokens are
   also dealt into 2048 buckets from the likeliest down, and counted or weighed in each.
3. ``_draw`` finishes a row. The buckets tell in which of them the border of top_k or top_p lies;
   its few tokens are listed, and the border is found among them by bisection. Of equals there the
   smaller ids stay. What is left is summed up by parts, and the draw looks into one of these.
"""

from subprocess import SubprocessError
from typing import Any

import torch
import triton
import triton.language as tl
from triton.errors import TritonError
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpretedFunction

from shards.engines.device_draw import unit_bits
from shards.engines.torch_draw_border import (
    BUCKETS,
    LARGEST,
    LOWEST,
    amount,
    below,
    border_of,
    bucket_of,
    key_of,
    light,
    list_buckets,
    list_weights,
    nth,
    per_logit_of,
    portion,
    units,
)
from shards.engines.torch_rows import (
    AT,
    CHANCE,
    COLUMNS,
    MIN_P,
    SPARE,
    SURE,
    TEMPERATURE,
    TOP_K,
    UNSOUND,
)

# Tokens of a part, and parts that one program of the last kernel has in its registers at once.
_PART = tl.constexpr(4096)
_TILE_PARTS = tl.constexpr(2)
_WARPS, _DRAW_WARPS = 8, 16
_CLEARED = tl.constexpr(256)

_AT, _TOP_K, _SPARE = tl.constexpr(AT), tl.constexpr(TOP_K), tl.constexpr(SPARE)
_CHANCE, _TEMPERATURE = tl.constexpr(CHANCE), tl.constexpr(TEMPERATURE)
_MIN_P, _COLUMNS = tl.constexpr(MIN_P), tl.constexpr(COLUMNS)
_SURE, _UNSOUND = tl.constexpr(SURE), tl.constexpr(UNSOUND)


@triton.jit  # type: ignore[untyped-decorator]
def _real(given: "Any", column: tl.constexpr) -> "Any":
    return tl.load(given + column).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _peak(peaks: "Any", parts: "Any", padded: tl.constexpr) -> "Any":
    """The largest logit, the smallest id that has it, and whether the row is sound."""
    part = tl.arange(0, padded)
    best = tl.max(tl.load(peaks + part, mask=part < parts, other=LOWEST), axis=0)
    key = (best >> 32).to(tl.int32)
    peak = (key ^ ((key >> 31) & LARGEST)).to(tl.float32, bitcast=True)
    return peak, LARGEST - (best & LARGEST), tl.abs(peak) < float("inf")


@triton.jit  # type: ignore[untyped-decorator]
def _filters(given: "Any", vocab: "Any") -> "Any":
    """Whether top_k is on, and top_p."""
    spare = tl.load(given + _SPARE) | tl.load(given + _SPARE + 1)
    return tl.load(given + _TOP_K) < vocab, spare > 0


@triton.jit  # type: ignore[untyped-decorator]
def _peaks(  # noqa: PLR0917 - a kernel takes its pointers, numbers and sizes one by one
    logits: "Any",
    given: "Any",
    peaks: "Any",
    buckets: "Any",
    stride: "Any",
    vocab: "Any",
    parts: "Any",
) -> None:
    """Logit and id of the likeliest token of one part, in one number; clears the row's buckets."""
    row, part = tl.program_id(0), tl.program_id(1)
    ids = part * _PART + tl.arange(0, _PART)
    at = tl.load(given + row * _COLUMNS + _AT)
    x = tl.load(logits + at * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    packed = (key_of(x).to(tl.int64) << 32) + (LARGEST - ids)
    tl.store(peaks + row * parts + part, tl.max(tl.where(ids < vocab, packed, LOWEST), axis=0))
    for start in range(part * _CLEARED, BUCKETS, parts * _CLEARED):
        place = buckets + row * BUCKETS + start + tl.arange(0, _CLEARED)
        tl.store(place, tl.zeros((_CLEARED,), tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _weigh(  # noqa: PLR0913, PLR0917
    logits: "Any",
    given: "Any",
    peaks: "Any",
    buckets: "Any",
    weights: "Any",
    sums: "Any",
    stride: "Any",
    vocab: "Any",
    parts: "Any",
    scale: "Any",
    padded: tl.constexpr,
    exact: tl.constexpr,
) -> None:
    """Weights of one part, their mass, and what it adds to the row's buckets."""
    row, part = tl.program_id(0), tl.program_id(1)
    given += row * _COLUMNS
    peak, _best, sound = _peak(peaks + row * parts, parts, padded)
    temperature = _real(given, _TEMPERATURE)
    if sound & (temperature > 0.0):
        ids = part * _PART + tl.arange(0, _PART)
        place = logits + tl.load(given + _AT) * stride + ids
        x = tl.load(place, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        scaled = tl.div_rn(x - peak, tl.zeros((_PART,), tl.float32) + temperature)
        # As exact as torch is; the other one is faster, and is what an interpreter has.
        if exact:  # noqa: SIM108 - known when compiled
            w = libdevice.exp(scaled)
        else:
            w = tl.exp(scaled)
        mass = units(w, scale)
        buckets += row * BUCKETS
        filtered, nucleus = _filters(given, vocab)
        if filtered:
            bucket = below(x, peak, per_logit_of(temperature))
            ones = tl.full((_PART,), 1, tl.int64)
            tl.atomic_add(buckets + bucket, ones, mask=bucket < BUCKETS - 1, sem="relaxed")
        elif nucleus:
            # All that weigh less than this may be left out together: they need no bucket.
            least = portion(tl.full((), scale, tl.float32).to(tl.int64), given + _SPARE) // vocab
            seen = (mass > 0) & (mass >= least)
            tl.atomic_add(buckets + light(w), mass, mask=seen, sem="relaxed")
        else:
            w = tl.where(w >= _real(given, _MIN_P), w, 0.0)
            mass = units(w, scale)
        tl.store(weights + row * vocab + ids, w, mask=ids < vocab)
        tl.store(sums + row * parts + part, tl.sum(mass, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def _kept(  # noqa: PLR0913, PLR0917
    logits: "Any",
    weights: "Any",
    at: "Any",
    vocab: "Any",
    filtered: "Any",
    border: "Any",
    end: "Any",
    lightest: "Any",
    lightest_end: "Any",
    min_p: "Any",
) -> "Any":
    """Weights of tokens, 0 where a filter leaves them out."""
    w = tl.load(weights + at, mask=at < vocab, other=0.0)
    bits = w.to(tl.int32, bitcast=True).to(tl.int64)
    kept = (bits > lightest) | ((bits == lightest) & (at <= lightest_end))
    if filtered:
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        key = key_of(x).to(tl.int64)
        kept = kept & ((key > border) | ((key == border) & (at <= end)))
    return tl.where(kept & (w >= min_p), w, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _borders(  # noqa: PLR0913, PLR0917
    logits: "Any",
    given: "Any",
    buckets: "Any",
    weights: "Any",
    sums: "Any",
    keys: "Any",
    ids: "Any",
    vocab: "Any",
    parts: "Any",
    peak: "Any",
    temperature: "Any",
    filtered: "Any",
    nucleus: "Any",
    scale: "Any",
    padded: tl.constexpr,
) -> "Any":
    """The lowest logit that top_k leaves, and the last id that has it; the same of weights."""
    # Below all that there is.
    border, end = tl.full((), LOWEST, tl.int64), tl.full((), -1, tl.int32)
    lightest, lightest_end = tl.full((), LOWEST, tl.int64), tl.full((), -1, tl.int32)
    needed = tl.load(given + _TOP_K)
    if not filtered:
        part = tl.arange(0, padded)
        whole = tl.sum(tl.load(sums + part, mask=part < parts, other=0), axis=0)
        needed = whole - portion(whole, given + _SPARE)
    last, before = bucket_of(buckets, needed)
    # Behind top_k, top_p goes by the weights of all that it leaves.
    first = tl.where(filtered & nucleus, 0, last)
    before = tl.where(first == 0, 0, before)
    last = tl.minimum(last, tl.where(filtered, BUCKETS - 2, BUCKETS - 1))
    per_logit = per_logit_of(temperature)
    # fmt: off
    count = list_buckets(
        logits, weights, keys, ids, vocab, peak, per_logit, filtered, first, last
    )
    # fmt: on
    room = needed - before
    if filtered:
        # Else top_k only leaves out what weighs nothing.
        if count >= room:
            border = border_of(keys, count, room, scale, False)
            room -= amount(keys, count, border + 1, scale, False)
            end = nth(keys, ids, count, border, room)
        if nucleus:
            list_weights(keys, ids, count, weights, border, end)
            whole = amount(keys, count, 0, scale, True)
            room = whole - portion(whole, given + _SPARE)
    if nucleus:
        lightest = border_of(keys, count, room, scale, True)
        room -= amount(keys, count, lightest + 1, scale, True)
        each = units(lightest.to(tl.int32).to(tl.float32, bitcast=True), scale)
        each = tl.maximum(each, 1)
        room = tl.maximum((room + each - 1) // each, 1)
        lightest_end = nth(keys, ids, count, lightest, room)
    return border, end, lightest, lightest_end


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # noqa: PLR0913, PLR0917
    logits: "Any",
    given: "Any",
    peaks: "Any",
    buckets: "Any",
    weights: "Any",
    sums: "Any",
    keys: "Any",
    ids: "Any",
    out: "Any",
    stride: "Any",
    vocab: "Any",
    parts: "Any",
    scale: "Any",
    padded: tl.constexpr,
) -> None:
    """Token and state of one row."""
    row = tl.program_id(0)
    given += row * _COLUMNS
    logits += tl.load(given + _AT) * stride
    weights += row * vocab
    sums += row * parts
    peak, token, sound = _peak(peaks + row * parts, parts, padded)
    temperature = _real(given, _TEMPERATURE)
    if sound & (temperature > 0.0):
        filtered, nucleus = _filters(given, vocab)
        border, end = tl.full((), LOWEST, tl.int64), tl.full((), -1, tl.int32)
        lightest, lightest_end = tl.full((), LOWEST, tl.int64), tl.full((), -1, tl.int32)
        min_p = _real(given, _MIN_P)
        # fmt: off
        if filtered | nucleus:
            border, end, lightest, lightest_end = _borders(
                logits, given, buckets + row * BUCKETS, weights, sums, keys + row * vocab,
                ids + row * vocab, vocab, parts, peak, temperature, filtered, nucleus, scale,
                padded,
            )
            for start in range(0, parts, _TILE_PARTS):
                some = start + tl.arange(0, _TILE_PARTS)
                at = some[:, None] * _PART + tl.arange(0, _PART)[None, :]
                w = _kept(
                    logits, weights, at, vocab, filtered, border, end, lightest, lightest_end,
                    min_p,
                )
                tl.store(sums + some, tl.sum(units(w, scale), axis=1), mask=some < parts)
            tl.debug_barrier()
        some = tl.arange(0, padded)
        held = tl.load(sums + some, mask=some < parts, other=0)
        wanted = portion(tl.sum(held, axis=0), given + _CHANCE)
        passed = tl.cumsum(held, axis=0) <= wanted
        wanted -= tl.sum(tl.where(passed, held, 0), axis=0)
        begin = tl.sum(passed.to(tl.int32), axis=0) * _PART
        at = begin + tl.arange(0, _PART)
        w = _kept(
            logits, weights, at, vocab, filtered, border, end, lightest, lightest_end, min_p
        )
        # fmt: on
        mass = tl.cumsum(units(w, scale), axis=0)
        token = (begin + tl.sum((mass <= wanted).to(tl.int32), axis=0)).to(tl.int64)
    tl.store(out + 2 * row, tl.where(sound, token, 0))
    tl.store(out + 2 * row + 1, tl.where(sound, _SURE, _UNSOUND).to(tl.int64))


class DrawKernel:
    """The kernels, and their scratch memory, for the rows of one stream.

    ``logits_max`` are worked on at once, with 12 bytes of scratch for each, or else one row.
    """

    def __init__(self, vocab_size: int, logits_max: int = 1 << 23) -> None:
        self._vocab = vocab_size
        self._parts = triton.cdiv(vocab_size, _PART.value)
        self._padded = triton.next_power_of_2(self._parts)
        self._scale = 2.0 ** unit_bits(vocab_size)
        self._exact = not isinstance(_weigh, InterpretedFunction)
        self._rows_max = max(1, logits_max // vocab_size)
        self._rows = 0
        self._whole: Any = None
        self._real: Any = None
        self._listed: Any = None

    def __call__(self, logits: Any, given: Any) -> Any:
        """Tokens and states [rows, 2] of int64 of the rows that are ``given`` (``torch_rows``).

        ``logits`` [any, vocabulary] are of any real type of up to 32 bits. A row that is not finite
        gets token 0. Nothing waits. Raises ``RuntimeError`` if they cannot be compiled.
        """
        rows = len(given)
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        if rows <= self._rows_max:
            return self._some(logits, given)
        starts = range(0, rows, self._rows_max)
        found = [self._some(logits, given[at : at + self._rows_max]) for at in starts]
        return torch.cat(found)

    def _some(self, logits: Any, given: Any) -> Any:
        rows = len(given)
        if rows > self._rows:
            self._grow(rows, logits.device)
        try:
            return self._launch(logits, given, rows)
        except (TritonError, SubprocessError, OSError) as error:
            raise RuntimeError(f"its kernel does not compile: {error}") from error

    def _launch(self, logits: Any, given: Any, rows: int) -> Any:
        parts, padded = self._parts, self._padded
        out = torch.empty((rows, 2), dtype=torch.int64, device=logits.device)
        peaks, sums, buckets = self._whole
        sizes = logits.stride(0), self._vocab, parts
        _peaks[rows, parts](logits, given, peaks, buckets, *sizes, num_warps=_WARPS)
        # fmt: off
        _weigh[rows, parts](
            logits, given, peaks, buckets, self._real, sums, *sizes, self._scale, padded,
            self._exact, num_warps=_WARPS,
        )
        _draw[rows,](
            logits, given, peaks, buckets, self._real, sums, *self._listed, out, *sizes,
            self._scale, padded, num_warps=_DRAW_WARPS,
        )
        # fmt: on
        return out

    def _grow(self, rows: int, device: torch.device) -> None:
        """Has scratch memory for so many rows."""
        self._rows = rows = min(triton.next_power_of_2(rows), self._rows_max)
        widths = self._parts, self._parts, BUCKETS.value
        self._whole = [
            torch.empty((rows, width), dtype=torch.int64, device=device) for width in widths
        ]
        size = rows, self._vocab
        self._real = torch.empty(size, dtype=torch.float32, device=device)
        self._listed = [torch.empty(size, dtype=torch.int32, device=device) for _ in range(2)]
