"""The programs of one engine, compiled ahead: serving can only run them, never compile.

A program is called with arrays of exactly the shapes and the layout over ranks that it was compiled
for, or fails; so nothing is compiled by accident. How a step becomes programs is in ``jax_steps``.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from shards.engines.base import Progress
from shards.engines.jax_buckets import Buckets, nothing, ordered, pack, pieces
from shards.engines.jax_mesh import Group
from shards.engines.jax_model import Model
from shards.engines.jax_sampling import DeviceSampler
from shards.engines.jax_steps import SAME, TABLE, Arrays, ByLayer, Compiled, Compiler, Whole
from shards.engines.threads import usable_cores
from shards.kv import Ints, StepLayout

# XLA compiles one program on one core, mostly.
COMPILERS_MAX = 16
# XLA may make its graphs at the second run of a program.
WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Logits:
    """What came of a step, on the device: float32 logits of which the first rows mean something.

    ``draws`` is None if no sequence draws; with it go the ``best`` tokens, see ``Model.best``, if
    the device finds them, and these once more as ``Programs.late`` wants them. ``scores`` are
    computed as they are asked for, and go with the number of their rows; so are those ``of`` some
    of the drawing sequences, once more.
    """

    draws: Array | None
    best: Array | None
    late: Array | None
    scores: Iterator[tuple[Array, int]]
    of: Callable[[Sequence[int]], Iterator[tuple[Array, int]]]


class Programs:
    """Compiles on construction; ``run`` computes one step. ``whole``: see ``jax_steps``.

    Whole steps are also run, on padding: what a device does at its first run (it loads
    kernels, makes graphs) is done then, and memory that does not suffice is found before serving.
    ``best``: whether the likeliest tokens are found behind each head. ``drawer``: its programs are
    compiled, too.

    ``late`` are the tokens that the step before drew, where the host may not know them yet: int32,
    of as many rows as draw at most.
    """

    def __init__(
        self,
        model: Model,
        compiler: Compiler,
        arrays: Arrays,
        buckets: Buckets,
        progress: Progress,
        *,
        whole: bool,
        best: bool,
        drawer: DeviceSampler | None = None,
    ) -> None:
        self._model, self._compiler, self._buckets = model, compiler, buckets
        self._group: Group = compiler.group
        self._arrays = arrays
        self._draw_counts = buckets.draw_counts
        kind = Whole if whole else ByLayer
        self._steps = kind(model, compiler, arrays, self._draw_counts[-1])
        self._head: dict[int, Compiled] = {}
        self._finds_best = best
        self.late: Array = self._group.put(np.zeros(self._draw_counts[-1], np.int32))
        # Ranks compile in one order: XLA may let them share what it finds out.
        threads = min(COMPILERS_MAX, usable_cores()) if whole and self._group.world == 1 else 1
        jobs = [*self._jobs(), *(drawer.jobs() if drawer else ())]
        for done, _ in enumerate(_called(jobs, threads), start=1):
            progress(done / len(jobs))
        if whole:
            self._warm_up(drawer)

    @property
    def count(self) -> int:
        """How many programs there are."""
        return self._steps.count + len(self._head)

    def run(self, layout: StepLayout) -> Logits:
        """Computes one step; its logits can be had until the next one is run."""
        bucket = self._buckets.fit(layout)
        layout = ordered(layout, bucket)
        x, picked = self._steps.run(bucket, self._group.put(pack(layout, bucket)), self.late)
        draws, best, late = None, None, None
        if len(layout.draws):
            draws, best, late = self._logits(picked, len(layout.draws))
        elif not len(layout.scores):
            x.block_until_ready()

        def logits(indices: Ints) -> Iterator[tuple[Array, int]]:
            for piece, count in pieces(indices, bucket):
                picked = self._steps.pick(bucket, x, self._group.put(piece))
                yield self._logits(picked, count)[0], count

        return Logits(
            draws, best, late, logits(layout.scores), lambda rows: logits(layout.draws[list(rows)])
        )

    def _logits(self, picked: Array, count: int) -> tuple[Array, Array | None, Array | None]:
        """Float32 logits [at least ``count``, vocabulary] of the first of the picked rows.

        And their best tokens, in both ways of ``Logits``, if these are wanted.
        """
        rows = next(rows for rows in self._draw_counts if rows >= count)
        outside = self._arrays.outside
        logits, *best = self._head[rows](picked, outside["norm"], outside["head"])
        return (logits, *best) if best else (logits, None, None)

    # Compilation --------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Callable[[], None]]:
        """What is to be compiled, in an order that is the same on every rank."""
        for bucket in (*self._buckets.decodes, *self._buckets.mixed):
            yield partial(self._steps.compile, bucket)
        for count in self._draw_counts:
            yield partial(self._compile_head, count)

    def _compile_head(self, count: int) -> None:
        model, outside = self._model, self._arrays.outside
        picked = self._compiler.same((self._draw_counts[-1], model.config.width), model.dtype)

        def head(picked: Array, norm: Array, table: Array) -> tuple[Array, ...]:
            logits = model.head(picked[:count], norm, table)
            if not self._finds_best:
                return (logits,)
            best = model.best(logits)
            return logits, best, jnp.pad(best[0], (0, len(picked) - count))

        self._head[count], _ = self._compiler(
            head, (picked, outside["norm"], outside["head"]), (SAME, SAME, TABLE), SAME
        )

    def _warm_up(self, drawer: DeviceSampler | None) -> None:
        """Runs everything on padding, which writes to the trash page alone."""
        for bucket in (*self._buckets.decodes, *self._buckets.mixed):
            vector = self._group.put(nothing(bucket))
            for _ in range(WARM_UPS):
                x, picked = self._steps.run(bucket, vector, self.late)
                x.block_until_ready()
        for count in self._draw_counts:
            logits, *_ = self._logits(picked, count)
            logits.block_until_ready()
            if drawer is not None:
                drawer.warm_up(logits)


def _called(jobs: Sequence[Callable[[], None]], threads: int) -> Iterator[None]:
    """Calls all, and yields whenever the next in order is done."""
    if threads == 1:
        for job in jobs:
            yield job()
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda job: job(), jobs)
