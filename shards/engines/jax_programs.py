"""The programs of one engine, compiled ahead: serving can only run them, never compile.

A program is called with arrays of exactly the shapes and the layout over ranks that it was compiled
for, or fails; so nothing is compiled by accident. All layers of a model are one and the same
program, called once for each: what is compiled, and how long that takes, does not grow with the
number of layers. Calls return before they are done, so the device does not wait for them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from shards.engines.base import Progress
from shards.engines.jax_buckets import Bucket, Buckets, ordered, pack, pieces
from shards.engines.jax_mesh import AXIS, Group
from shards.engines.jax_model import LAYOUTS, Model
from shards.kv import StepLayout

Compiled = Any
CACHE = PartitionSpec(None, None, AXIS, None)
_SAME = PartitionSpec()


@dataclass(slots=True)
class Arrays:
    """What stays on the device: weights outside the layers, weights and cache of each layer."""

    outside: dict[str, Array]
    layers: list[dict[str, Array]]
    caches: list[Array]


@dataclass(frozen=True, slots=True)
class Logits:
    """What came of a step, on the device: float32 logits of which the first rows mean something.

    ``draws`` is None if no sequence draws. ``scores`` are computed as they are asked for, and go
    with the number of their rows.
    """

    draws: Array | None
    scores: Iterator[tuple[Array, int]]


class Programs:
    """Compiles on construction; ``run`` computes one step."""

    def __init__(
        self,
        model: Model,
        group: Group,
        arrays: Arrays,
        buckets: Buckets,
        progress: Progress,
    ) -> None:
        self._model, self._group, self._buckets = model, group, buckets
        self._arrays = arrays
        self._draw_counts = tuple(bucket.sequences for bucket in buckets.decodes)
        self._windows = model.config.windows
        self._embed: dict[Bucket, Compiled] = {}
        self._layer: dict[tuple[Bucket, int], Compiled] = {}
        self._pick: dict[Bucket, Compiled] = {}
        self._head: dict[int, Compiled] = {}
        self._best: dict[int, Compiled] = {}
        jobs = list(self._jobs())
        for done, job in enumerate(jobs, start=1):
            job()
            progress(done / len(jobs))

    @property
    def count(self) -> int:
        """How many programs there are."""
        kinds = (self._embed, self._layer, self._pick, self._head, self._best)
        return sum(len(kind) for kind in kinds)

    def run(self, layout: StepLayout) -> "Logits":
        """Computes one step; its logits can be had until the next one is run."""
        bucket = self._buckets.fit(layout)
        layout = ordered(layout, bucket)
        vector = self._group.put(pack(layout, bucket))
        outside, caches = self._arrays.outside, self._arrays.caches
        x, step = self._embed[bucket](outside["embed"], vector)
        for number, layer in enumerate(self._arrays.layers):
            program = self._layer[bucket, self._windows[number]]
            x, caches[number] = program(x, caches[number], layer, step)
        draws = None
        if len(layout.draws):
            draws = self._logits(bucket, x, step["draws"], len(layout.draws))
        elif not len(layout.scores):
            x.block_until_ready()
        scores = (
            (self._logits(bucket, x, self._group.put(piece), count), count)
            for piece, count in pieces(layout.scores, bucket)
        )
        return Logits(draws, scores)

    def _logits(self, bucket: Bucket, x: Array, indices: Array, count: int) -> Array:
        """Float32 logits [at least ``count``, vocabulary] behind some of a step's tokens."""
        picked = self._pick[bucket](x, indices)
        rows = next(rows for rows in self._draw_counts if rows >= count)
        outside = self._arrays.outside
        logits: Array = self._head[rows](picked, outside["norm"], outside["head"])
        return logits

    def best(self, logits: Array) -> tuple[Array, Array]:
        """The likeliest token of each row, and its logit."""
        found: tuple[Array, Array] = self._best[len(logits)](logits)
        return found

    # Compilation --------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Callable[[], None]]:
        """What is to be compiled, in an order that is the same on every rank."""
        for bucket in (*self._buckets.decodes, *self._buckets.mixed):
            yield partial(self._compile_step, bucket)
        for count in self._draw_counts:
            yield partial(self._compile_head, count)

    def _compile_step(self, bucket: Bucket) -> None:
        model = self._model
        vector = self._same((bucket.size,), jnp.int32)
        arrays = self._arrays
        self._embed[bucket], (x, step) = self._compile(
            lambda table, vector: model.embed(table, vector, bucket),
            (arrays.outside["embed"], vector),
            (PartitionSpec(AXIS, None), _SAME),
            _SAME,
        )
        specs = {name: PartitionSpec(*LAYOUTS[name]) for name in arrays.layers[0]}
        for window in sorted(set(self._windows)):
            self._layer[bucket, window], _ = self._compile(
                lambda x, cache, layer, step, window=window: model.layer(
                    x, cache, layer, step, bucket, window
                ),
                (x, arrays.caches[0], arrays.layers[0], step),
                (_SAME, CACHE, specs, _SAME),
                (_SAME, CACHE),
                donate=(1,),
            )
        self._pick[bucket], _ = self._compile(
            lambda x, draws: _padded(model.pick(x, draws), self._draw_counts[-1]),
            (x, step["draws"]),
            (_SAME, _SAME),
            _SAME,
        )

    def _compile_head(self, count: int) -> None:
        model, outside = self._model, self._arrays.outside
        picked = self._same((self._draw_counts[-1], model.config.width), model.dtype)
        table = PartitionSpec(AXIS, None)
        self._head[count], logits = self._compile(
            lambda picked, norm, head: model.head(picked[:count], norm, head),
            (picked, outside["norm"], outside["head"]),
            (_SAME, _SAME, table),
            _SAME,
        )
        self._best[count], _ = self._compile(model.best, (logits,), (_SAME,), _SAME)

    def _same(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The description of an array that is the same on every rank."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._group.sharding())

    def _compile(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        specs: tuple[Any, ...],
        out_specs: Any,
        donate: tuple[int, ...] = (),
    ) -> tuple[Compiled, Any]:
        """A compiled program, and the description of what it returns.

        That its results are the same on every rank is the model's promise, not checked by JAX.
        """
        mapped = jax.shard_map(
            function, mesh=self._group.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        lowered = jax.jit(mapped, donate_argnums=donate).lower(*arguments)
        described = jax.tree.map(lambda info: self._same(info.shape, info.dtype), lowered.out_info)
        return lowered.compile(), described


def _padded(rows: Array, count: int) -> Array:
    return jnp.pad(rows, ((0, count - len(rows)), (0, 0)))
