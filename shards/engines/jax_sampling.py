"""Draws on the device, for rows that ask for no more than temperature, top_k, top_p and min_p.

To bring a row of 128,000 logits to the host and to draw there takes longer than many a step. Rows
that ask for more (penalties, a constraint, typical_p, very many likely tokens) still go there, and
only those: their logits are computed once more, which reads the head again but needs no program.

A row gets the token that ``shards.sampling`` would give it, up to rounding, whatever its neighbours
are: see ``jax_filters``. All rows of a step are drawn by one program, which has the filters that
any of them needs; the others have them off, which changes nothing, as all sums are exact. Programs
are compiled when the model is loaded, as the steps are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from shards.engines import jax_filters
from shards.engines.base import EngineLost, Logprobs, SamplingParams
from shards.engines.device_draw import draw_there, parts, serves, spare_share, unit_bits
from shards.engines.jax_filters import Filters
from shards.engines.jax_steps import SAME, Compiled, Compiler
from shards.filters import Floats
from shards.sampling import NOT_FINITE, Drawn, Row, Sampler, uniform

# Likely tokens that are told at most: what OpenAI allows.
TOPS_MAX = 20
FILTERS = (Filters(False, False), Filters(False, True), Filters(True, True))
# Devices may take what is less for 0, which is greedy.
_TEMPERATURE_LEAST = 2.0**-126
_GIVEN = 7
_TOKEN, _PEAK, _CHOSEN, _RANK, _UPPER, _LOWER = range(6)
_BITS_32 = (1 << 32) - 1
Table = NDArray[np.int32]


class DeviceSampler:
    """Draws the rows of a step, on the device where it can and else by the host's sampler.

    ``fault`` says why the device cannot be used, if it was found that it cannot. ``row_counts`` are
    the numbers of rows that logits may have.
    """

    def __init__(
        self, vocab_size: int, sampler: Sampler, compiler: Compiler, row_counts: Sequence[int]
    ) -> None:
        self._vocab, self._sampler, self._compiler = vocab_size, sampler, compiler
        self._tops_max = min(TOPS_MAX, vocab_size)
        self._bits = unit_bits(vocab_size)
        self._row_counts = row_counts
        self._draws: dict[tuple[int, Filters], Compiled] = {}
        self._tops: dict[int, Compiled] = {}
        self.fault = ""

    # Compilation --------------------------------------------------------------------------------

    def jobs(self) -> Iterator[Callable[[], None]]:
        """What is to be compiled, in an order that is the same on every rank."""
        for count in self._row_counts:
            for filters in FILTERS:
                yield partial(self._compile_draw, count, filters)
            yield partial(self._compile_tops, count)

    def _compile_draw(self, count: int, filters: Filters) -> None:
        drawing = partial(jax_filters.draw, bits=self._bits, filters=filters)
        spare = self._row_counts[-1] - count

        def drawn(logits: Array, given: Array) -> tuple[Array, Array]:
            found = jax_filters.in_parts(drawing, logits, given)
            return found, jnp.pad(found[:, _TOKEN], (0, spare))

        given = self._compiler.same((count, _GIVEN), jnp.int32)
        self._draws[count, filters] = self._compiled(drawn, self._logits(count), given)

    def _compile_tops(self, count: int) -> None:
        telling = partial(jax_filters.tops, count=self._tops_max)
        told = partial(jax_filters.in_parts, telling)
        self._tops[count] = self._compiled(told, self._logits(count))

    def _compiled(self, function: Callable[..., Any], *arguments: Any) -> Compiled:
        """A program, or None and a fault if there is no way to compute that on the device."""
        try:
            with jax.enable_x64(True):
                return self._compiler(function, arguments, (SAME,) * len(arguments), SAME)[0]
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            self.fault = _failed(error)
            return None

    def warm_up(self, logits: Array) -> None:
        """Runs all programs for logits of so many rows, unless there is a fault."""
        if self.fault:
            return
        count = len(logits)
        given = self._compiler.group.put(np.zeros((count, _GIVEN), np.int32))
        try:
            for filters in FILTERS:
                self._draws[count, filters](logits, given)[0].block_until_ready()
            self._tops[count](logits).block_until_ready()
        except RuntimeError as error:
            self.fault = _failed(error)

    def _logits(self, count: int) -> Any:
        return self._compiler.same((count, self._vocab), jnp.float32)

    def draw_host(self, logits: Floats, rows: Sequence[Row]) -> Drawn:
        """Draws of logits in the host's memory, as many rows at once as a step may have.

        Only for rows that the device draws.
        """
        whole = Drawn([])
        most = self._row_counts[-1]
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            count = next(count for count in self._row_counts if count >= len(part))
            padded = np.zeros((count, self._vocab), np.float32)
            padded[: len(part)] = logits[start : start + most]
            drawn = self.draw(self._compiler.group.put(padded), part, _nothing)
            whole.tokens += drawn.tokens
            whole.logprobs |= {start + index: told for index, told in drawn.logprobs.items()}
            whole.failures |= {start + index: why for index, why in drawn.failures.items()}
        return whole

    # A step -------------------------------------------------------------------------------------

    def draw(
        self, logits: Array, rows: Sequence[Row], bring: Callable[[Sequence[int]], Floats]
    ) -> Drawn:
        """As ``Sampler.draw``, of logits [at least that many rows, vocabulary] on the device.

        ``bring`` brings the logits of some rows to the host.
        """
        return self.begin(logits, rows, bring).take()

    def begin(
        self, logits: Array, rows: Sequence[Row], bring: Callable[[Sequence[int]], Floats]
    ) -> "Pending":
        """Has the device draw what it can, and waits for nothing."""
        here: list[int] = []
        there: list[int] = []
        for index, row in enumerate(rows):
            (here if self._serves(row) else there).append(index)
        launched = self._launch(logits, rows, here) if here else None

        def finish() -> Drawn:
            drawn = Drawn([0] * len(rows))
            if there:
                draw_there(self._sampler, bring(there), rows, there, drawn)
            if launched is not None:
                self._take(launched.told, rows, here, drawn)
            return drawn

        if launched is None:
            return Pending((), None, finish)
        return Pending(launched.told, None if there else launched.late, finish)

    def _serves(self, row: Row) -> bool:
        return serves(row) and self._wanted(row.sampling) <= self._tops_max

    def _wanted(self, sampling: SamplingParams) -> int:
        """How many likely tokens are told."""
        return min(sampling.top_logprobs, self._vocab) if sampling.logprobs else 0

    def _launch(self, logits: Array, rows: Sequence[Row], here: Sequence[int]) -> "_Launched":
        """Has the device draw some rows, and tell likely tokens; does not wait for it."""
        asked = [rows[index].sampling for index in here]
        sampled = [one for one in asked if one.temperature > 0.0]
        top_k = any(0 < one.top_k < self._vocab for one in sampled)
        top_p = top_k or any(0.0 < one.top_p < 1.0 for one in sampled)
        given = self._compiler.group.put(self._pack(rows, here, len(logits)))
        found, late = self._draws[len(logits), Filters(top_k, top_p)](logits, given)
        told = [found]
        if any(map(self._wanted, asked)):
            told.append(self._tops[len(logits)](logits))
        for one in told:
            one.copy_to_host_async()
        return _Launched(tuple(told), late)

    def _pack(self, rows: Sequence[Row], here: Sequence[int], count: int) -> Table:
        """What the device must know of the rows, in one array; see ``jax_filters.Asked``."""
        given = np.zeros((count, _GIVEN), np.int32)
        whole, real = [], []
        for index in here:
            sampling = rows[index].sampling
            top_k = sampling.top_k if 0 < sampling.top_k < self._vocab else self._vocab
            chance = uniform(sampling.seed, len(rows[index].tokens))
            whole.append((top_k, *parts(spare_share(sampling.top_p)), *parts(chance)))
            warmth = sampling.temperature
            warmth = max(warmth, _TEMPERATURE_LEAST) if warmth > 0.0 else 0.0
            real.append((warmth, min(sampling.min_p, 1.0)))
        given[here, :-2] = whole
        given[here, -2:] = np.array(real, np.float32).view(np.int32)
        return given

    def _take(
        self,
        told: Sequence[Array],
        rows: Sequence[Row],
        here: Sequence[int],
        drawn: Drawn,
    ) -> None:
        """Waits for the device, and fills in its rows."""
        found, *more = map(_host, told)
        likely = more[0] if more else None
        reals = found.view(np.float32)
        for index in here:
            if not math.isfinite(reals[index, _PEAK]):
                drawn.failures[index] = NOT_FINITE
                continue
            drawn.tokens[index] = int(found[index, _TOKEN])
            if rows[index].sampling.logprobs:
                tops = None if likely is None else likely[index]
                drawn.logprobs[index] = self._told(found[index], tops, rows[index].sampling)

    def _told(self, found: Table, likely: Table | None, sampling: SamplingParams) -> Logprobs:
        whole, real = found.tolist(), found.view(np.float32).tolist()
        total = (whole[_UPPER] << 32) + (whole[_LOWER] & _BITS_32)
        # In units; the likeliest token has 2 to the power of ``bits``.
        log_total = real[_PEAK] + math.log(total) - self._bits * math.log(2.0)
        count = self._wanted(sampling)
        ids: list[int] = []
        values: list[float] = []
        if likely is not None:
            ids = likely[:count].tolist()
            reals = likely[self._tops_max : self._tops_max + count].view(np.float32)
            values = [value - log_total for value in reals.tolist()]
        rank = whole[_RANK] if sampling.ranks else 0
        return Logprobs(real[_CHOSEN] - log_total, ids, values, rank)


class _Launched(NamedTuple):
    """What the device was given to tell: what it drew, perhaps likely tokens; and ``late``."""

    told: tuple[Array, ...]
    late: Array


class Pending:
    """Draws under way: see ``caller.Drawing``.

    ``late`` are their tokens as ``Programs.late`` wants them; None if the host draws some of them.
    """

    def __init__(
        self, arrays: Sequence[Array], late: Array | None, finish: Callable[[], Drawn]
    ) -> None:
        self.late = late
        self._arrays = arrays
        self._finish = finish

    @property
    def done(self) -> bool:
        """See ``caller.Drawing``."""
        return all(one.is_ready() for one in self._arrays)

    def wait(self) -> None:
        """See ``caller.Drawing``."""
        for one in self._arrays:
            one.block_until_ready()

    def take(self) -> Drawn:
        """See ``caller.Drawing``. Raises ``EngineLost`` if the step failed."""
        try:
            return self._finish()
        except jax.errors.JaxRuntimeError as error:
            raise lost(error) from error


def lost(error: Exception) -> EngineLost:
    """What XLA says is long; a lost rank shows as a connection that was closed."""
    reason = str(error).split("\n", maxsplit=1)[0]
    return EngineLost(f"jax: the step failed, perhaps because another rank is gone: {reason}")


def _failed(error: Exception) -> str:
    return f"it failed: {(str(error).splitlines() or [repr(error)])[0]}"


def _nothing(_rows: Sequence[int]) -> Floats:
    raise AssertionError("the device draws all of these rows")


def _host(value: Array) -> Table:
    """An array that is the same on all ranks, in host memory."""
    table: Table = np.asarray(value.addressable_data(0))
    return table
