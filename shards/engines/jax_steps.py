"""The two ways to compute a step up to its logits: layer by layer, or all at once.

``ByLayer``: all layers of a model are one and the same program, called once for each. What is
compiled, and how long that takes, does not grow with the number of layers. A call costs its host 50
to 100 microseconds, which is nothing beside the computation of a CPU.

``Whole``: embedding, layers and pick are one program. Accelerators compute a layer in less time
than a call takes, and XLA can hand them many kernels at once, as CUDA graphs. What a call costs its
host grows with the number of arrays that it is handed, above all those that it updates, so the
caches of all layers are one array, one behind the other, and so are all norms.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from shards.engines.jax_buckets import Bucket
from shards.engines.jax_mesh import AXIS, Group
from shards.engines.jax_model import LAYOUTS, Model

Compiled = Any
Weights = Mapping[str, Array]
SAME = PartitionSpec()
TABLE = PartitionSpec(AXIS, None)


@dataclass(slots=True)
class Arrays:
    """What stays on the device: weights outside the layers, weights and cache of each layer.

    There may be one cache that has the pages of all layers.
    """

    outside: dict[str, Array]
    layers: list[dict[str, Array]]
    caches: list[Array]


@dataclass(frozen=True, slots=True)
class Compiler:
    """Compiles for a group of ranks. ``options`` are XLA's own."""

    group: Group
    options: Mapping[str, Any] = field(default_factory=dict)

    def same(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """The description of an array that is the same on every rank."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.group.sharding())

    def __call__(
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
            function, mesh=self.group.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        lowered = jax.jit(mapped, donate_argnums=donate).lower(*arguments)
        described = jax.tree.map(lambda info: self.same(info.shape, info.dtype), lowered.out_info)
        return lowered.compile(dict(self.options) or None), described


class Steps(ABC):
    """The programs for each bucket, up to the rows that draw, filled up to ``rows``."""

    def __init__(self, model: Model, compiler: Compiler, arrays: Arrays, rows: int) -> None:
        self._model, self._compiler, self._arrays, self._rows = model, compiler, arrays, rows
        self._windows = model.config.windows
        self._cache = arrays.caches[0].sharding.spec
        self._pick: dict[Bucket, Compiled] = {}

    @property
    @abstractmethod
    def count(self) -> int:
        """How many programs there are."""

    @abstractmethod
    def compile(self, bucket: Bucket) -> None:
        """Compiles what the bucket needs; buckets may be compiled by several threads at once."""

    @abstractmethod
    def run(self, bucket: Bucket, vector: Array, late: Array) -> tuple[Array, Array]:
        """Computes a step; returns what left the last layer, and its ``draws``' rows of that.

        ``late``: see ``Model.embed``; of as many rows as draw at most.
        """

    def pick(self, bucket: Bucket, x: Array, indices: Array) -> Array:
        """Other rows of what left the last layer."""
        picked: Array = self._pick[bucket](x, indices)
        return picked

    def _compile_pick(self, bucket: Bucket) -> None:
        model = self._model
        x = self._compiler.same((bucket.tokens, model.config.width), model.dtype)
        draws = self._compiler.same((bucket.sequences,), jnp.int32)
        self._pick[bucket], _ = self._compiler(self._picked, (x, draws), (SAME, SAME), SAME)

    def _picked(self, x: Array, draws: Array) -> Array:
        return jnp.pad(self._model.pick(x, draws), ((0, self._rows - len(draws)), (0, 0)))

    def _given(self, bucket: Bucket) -> tuple[Any, Any]:
        """Descriptions of a step and of the tokens that came late."""
        sizes = bucket.size, self._rows
        step, late = (self._compiler.same((size,), jnp.int32) for size in sizes)
        return step, late

    def _specs(self) -> dict[str, PartitionSpec]:
        """How the weights of a layer lie over the ranks."""
        return {name: PartitionSpec(*LAYOUTS[name]) for name in self._arrays.layers[0]}


class ByLayer(Steps):
    """See the module."""

    def __init__(self, model: Model, compiler: Compiler, arrays: Arrays, rows: int) -> None:
        super().__init__(model, compiler, arrays, rows)
        self._embed: dict[Bucket, Compiled] = {}
        self._layer: dict[tuple[Bucket, int], Compiled] = {}

    @property
    def count(self) -> int:
        """See ``Steps``."""
        return len(self._embed) + len(self._layer) + len(self._pick)

    def compile(self, bucket: Bucket) -> None:
        """See ``Steps``."""
        model, arrays = self._model, self._arrays
        self._embed[bucket], (x, step) = self._compiler(
            lambda table, vector, late: model.embed(table, vector, late, bucket),
            (arrays.outside["embed"], *self._given(bucket)),
            (TABLE, SAME, SAME),
            SAME,
        )
        for window in sorted(set(self._windows)):
            self._layer[bucket, window], _ = self._compiler(
                lambda x, cache, layer, step, window=window: model.layer(
                    x, cache, layer, step, bucket, window
                ),
                (x, arrays.caches[0], arrays.layers[0], step),
                (SAME, self._cache, self._specs(), SAME),
                (SAME, self._cache),
                donate=(1,),
            )
        self._compile_pick(bucket)

    def run(self, bucket: Bucket, vector: Array, late: Array) -> tuple[Array, Array]:
        """See ``Steps``. Calls return before they are done: the device does not wait for them."""
        arrays = self._arrays
        x, step = self._embed[bucket](arrays.outside["embed"], vector, late)
        for number, layer in enumerate(arrays.layers):
            program = self._layer[bucket, self._windows[number]]
            x, arrays.caches[number] = program(x, arrays.caches[number], layer, step)
        return x, self.pick(bucket, x, step["draws"])


class Whole(Steps):
    """See the module."""

    def __init__(self, model: Model, compiler: Compiler, arrays: Arrays, rows: int) -> None:
        super().__init__(model, compiler, arrays, rows)
        self._step: dict[Bucket, Compiled] = {}
        same = [name for name in arrays.layers[0] if LAYOUTS[name] == ()]
        self._vectors = {name: self._stacked(name) for name in same}
        arrays.layers = [
            {name: weight for name, weight in layer.items() if name not in same}
            for layer in arrays.layers
        ]

    def _stacked(self, name: str) -> Array:
        """The vectors of all layers that have that name, the same on every rank."""
        parts = [np.asarray(layer[name].addressable_data(0)) for layer in self._arrays.layers]
        stacked: Array = self._compiler.group.put(np.stack(parts))
        return stacked

    @property
    def count(self) -> int:
        """See ``Steps``."""
        return len(self._step) + len(self._pick)

    def compile(self, bucket: Bucket) -> None:
        """See ``Steps``."""
        arrays = self._arrays
        (cache,) = arrays.caches
        self._step[bucket], _ = self._compiler(
            self._computed(bucket),
            (arrays.outside["embed"], *self._given(bucket), cache, self._vectors, arrays.layers),
            (TABLE, SAME, SAME, self._cache, SAME, [self._specs()] * len(arrays.layers)),
            (SAME, SAME, self._cache),
            donate=(3,),
        )
        self._compile_pick(bucket)

    def run(self, bucket: Bucket, vector: Array, late: Array) -> tuple[Array, Array]:
        """See ``Steps``."""
        arrays = self._arrays
        (cache,) = arrays.caches
        x, picked, arrays.caches[0] = self._step[bucket](
            arrays.outside["embed"], vector, late, cache, self._vectors, arrays.layers
        )
        return x, picked

    def _computed(self, bucket: Bucket) -> Callable[..., Any]:
        """The function of a whole step. A layer is traced once; XLA puts it in for each."""
        model = self._model
        traced = {
            window: jax.jit(
                lambda x, cache, layer, step, window=window: model.layer(
                    x, cache, layer, step, bucket, window
                )
            )
            for window in set(self._windows)
        }

        def computed(
            table: Array,
            vector: Array,
            late: Array,
            cache: Array,
            vectors: Weights,
            matrices: list[Weights],
        ) -> tuple[Array, Array, Array]:
            x, step = model.embed(table, vector, late, bucket)
            pages = cache.shape[0] // len(matrices)
            page_tokens = model.attention(0).page_tokens(cache)
            for number, (window, layer) in enumerate(zip(self._windows, matrices, strict=True)):
                page = number * pages
                own = {
                    "tables": step["tables"] + page,
                    "cells": step["cells"] + page * page_tokens,
                }
                weights = {**layer, **{name: every[number] for name, every in vectors.items()}}
                x, cache = traced[window](x, cache, weights, {**step, **own})
            return x, self._picked(x, step["draws"]), cache

        return computed
