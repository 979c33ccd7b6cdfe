"""The Llama block in JAX, for one rank of a group: its weights and its computation.

Tensor parallel as in arXiv:1909.08053, section 3: each rank has its share of the heads and of the
inner layer, whole rows of what comes first and whole columns of what comes second, so that one sum
over the ranks follows attention and one the inner layer. The vocabulary is cut by rows. What leaves
a function is the same on all ranks.

Weights keep the orientation of the files, [out, in]. Those that read the same input are joined:
queries, keys and values, and the two halves of the gated layer; one rank's parts lie together. With
kernels of our own weights are packed, which shows in their shape (``jax_native``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from shards.engines import jax_native
from shards.engines.jax_attention import Attention, Step
from shards.engines.jax_buckets import Bucket
from shards.engines.jax_config import LlamaConfig
from shards.engines.jax_mesh import AXIS, Group
from shards.weights import Weights

Layer = Mapping[str, Array]

_EMBED = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
# How each kind of weight lies over the ranks.
LAYOUTS: Mapping[str, tuple[str | None, ...]] = {
    "norm_in": (),
    "qkv": (AXIS, None),
    "qkv_bias": (AXIS,),
    "norm_q": (),
    "norm_k": (),
    "out": (None, AXIS),
    "out_bias": (),
    "norm_mlp": (),
    "gated": (AXIS, None),
    "gated_bias": (AXIS,),
    "gates": (AXIS, None),
    "down": (None, AXIS),
    "down_bias": (),
    "embed": (AXIS, None),
    "head": (AXIS, None),
    "norm": (),
}
# Those that are packed, where there are kernels that multiply by them. ``gates`` is ``gated`` in
# the order of a kernel of its own.
_PACKED = ("qkv", "out", "gated", "gates", "down", "head")


# Weights ---------------------------------------------------------------------------------------


class Loader:
    """Puts weights on the device, as much of each as this rank needs.

    ``native``: packed for kernels of our own, those that can be.
    """

    def __init__(
        self, weights: Weights, config: LlamaConfig, group: Group, dtype: Any, *, native: bool
    ) -> None:
        self._weights = weights
        self._config = config
        self._group = group
        self._dtype = np.dtype(dtype)
        self._native = native

    def outside(self) -> dict[str, Array]:
        """Embedding, last norm, and the head, which is the embedding if the model ties them."""
        tied = self._config.tied or _HEAD not in self._weights.shapes
        embed = self._vocabulary("head" if tied else "embed", _EMBED)
        head = embed if tied else self._vocabulary("head", _HEAD)
        norm = self._place("norm", self._config.width, lambda i: self._read("model.norm.weight", i))
        return {"embed": embed, "head": head, "norm": norm}

    def layer(self, number: int) -> dict[str, Array]:
        """All weights of one layer."""
        base = f"model.layers.{number}."
        inner, biased = self._config.inner, f"{base}{_GATED[0]}.bias" in self._weights.shapes
        gates = self._native and not biased and jax_native.gates(inner // self._group.world)
        gated = "gates" if gates else "gated"
        found = {
            "norm_in": self._whole("norm_in", base + "input_layernorm.weight"),
            "norm_mlp": self._whole("norm_mlp", base + "post_attention_layernorm.weight"),
            "qkv": self._joined("qkv", [f"{base}{name}.weight" for name in _QKV]),
            gated: self._joined(gated, [f"{base}{name}.weight" for name in _GATED]),
            "out": self._whole("out", base + "self_attn.o_proj.weight"),
            "down": self._whole("down", base + "mlp.down_proj.weight"),
        }
        if self._config.qk_norm:
            found["norm_q"] = self._whole("norm_q", base + "self_attn.q_norm.weight")
            found["norm_k"] = self._whole("norm_k", base + "self_attn.k_norm.weight")
        for kind, names in (("qkv_bias", _QKV), ("gated_bias", _GATED)):
            if f"{base}{names[0]}.bias" in self._weights.shapes:
                found[kind] = self._joined(kind, [f"{base}{name}.bias" for name in names])
        for kind, name in (("out_bias", "self_attn.o_proj"), ("down_bias", "mlp.down_proj")):
            if f"{base}{name}.bias" in self._weights.shapes:
                found[kind] = self._whole(kind, f"{base}{name}.bias")
        return found

    def _read(self, name: str, index: Any) -> Any:
        return self._weights.read(name, index, self._dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._weights.shapes:
            self._weights.read(name)  # says that it is missing
        return self._weights.shapes[name]

    def _place(self, kind: str, shape: Any, read: Callable[[Any], Any]) -> Array:
        shape = (shape,) if isinstance(shape, int) else shape
        sharding = self._group.sharding(*LAYOUTS[kind])
        packed = self._packed(kind, shape, read) if self._native and kind in _PACKED else None
        if packed is not None:
            cut = [self._group.world if axis else 1 for axis in (*LAYOUTS[kind], None, None)]
            whole = tuple(np.multiply(packed.shape, cut).tolist())
            return jax.make_array_from_callback(whole, sharding, lambda _index: packed)
        return jax.make_array_from_callback(shape, sharding, read)

    def _packed(self, kind: str, shape: tuple[int, ...], read: Callable[[Any], Any]) -> Any:
        """This rank's part of a weight as kernels of our own want it, or None if that cannot be."""
        world, rank = self._group.world, self._group.rank
        index, mine = [], []
        for length, axis in zip(shape, LAYOUTS[kind], strict=True):
            share = length // world if axis else length
            start = share * rank if axis else 0
            index.append(slice(start, start + share))
            mine.append(share)
        if not jax_native.packs(*mine):
            return None
        part = read(tuple(index))
        return jax_native.pack(jax_native.interleave(part) if kind == "gates" else part)

    def _whole(self, kind: str, name: str) -> Array:
        """A weight as it is, or this rank's columns of it."""
        return self._place(kind, self._shape(name), lambda index: self._read(name, index))

    def _joined(self, kind: str, names: Sequence[str]) -> Array:
        """This rank's rows of several weights, one after the other."""
        shapes = [self._shape(name) for name in names]
        rows, world, rank = [shape[0] for shape in shapes], self._group.world, self._group.rank
        mine = [slice(n // world * rank, n // world * (rank + 1)) for n in rows]

        def read(_index: Any) -> Any:
            return np.concatenate(
                [self._read(name, (part,)) for name, part in zip(names, mine, strict=True)]
            )

        return self._place(kind, (sum(rows), *shapes[0][1:]), read)

    def _vocabulary(self, kind: str, name: str) -> Array:
        """This rank's rows of an embedding, of which all have equally many: the last ones are 0."""
        rows, width = self._shape(name)
        padded = -(-rows // self._group.world) * self._group.world

        def read(index: Any) -> Any:
            start, end, _ = index[0].indices(padded)
            part = self._read(name, (slice(min(start, rows), min(end, rows)),))
            return np.pad(part, ((0, end - start - len(part)), (0, 0)))

        # A packed weight does not tell how many rows it has: the number of tokens does.
        kind = kind if rows == self._config.vocab_size else "embed"
        return self._place(kind, (padded, width), read)


# Computation -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """The functions of one rank. ``config`` has this rank's share, ``dtype`` is the activations'.

    ``vocab_size`` is the whole model's. ``native``: norms are computed by kernels of our own, too.
    They run inside ``shard_map``.
    """

    config: LlamaConfig
    vocab_size: int
    dtype: Any
    attention: Callable[[int], Attention]
    native: bool = False

    def embed(
        self, table: Array, vector: Array, late: Array, bucket: Bucket
    ) -> tuple[Array, dict[str, Array]]:
        """Unpacks a step, looks its tokens up [tokens, width]; adds the angles' cos and sin.

        ``late`` are those that the step before drew, which ``caller.late`` stands for.
        """
        step = {name: vector[span].reshape(shape) for name, span, shape in bucket.spans()}
        plain, tokens = table.ndim == 2, step["tokens"]
        rows = table.shape[0] if plain else self._vocabulary
        drawn = late[jnp.clip(-1 - tokens, 0, len(late) - 1)]
        places = jnp.where(tokens < 0, drawn, tokens) - lax.axis_index(AXIS) * rows
        mine = (places >= 0) & (places < rows)
        places = jnp.clip(places, 0, rows - 1)
        read = table[places] if plain else jax_native.rows(table, places)
        found = jnp.where(mine[:, None], read, 0)
        angles = jnp.array(self.config.frequencies, jnp.float32)
        angles = step["positions"].astype(jnp.float32)[:, None] * angles
        step |= {"cos": jnp.cos(angles), "sin": jnp.sin(angles)}
        return self._sum(found.astype(jnp.float32)).astype(self.dtype), step

    def layer(
        self, x: Array, cache: Array, layer: Layer, step: Step, bucket: Bucket, window: int
    ) -> tuple[Array, Array]:
        """One layer on [tokens, width]; the cache comes back with the step's keys and values."""
        real = _real(step)
        y = self._norm(x, layer["norm_in"], real)
        heads = self._qkv(y, layer, step)
        y, cache = self.attention(window).attend(heads, cache, step, bucket)
        y = y.astype(self.dtype).reshape(len(x), -1)
        x = self._add(x, y, layer, "out", step)
        y = self._gated(self._norm(x, layer["norm_mlp"], real), layer, step)
        return self._add(x, y, layer, "down", step), cache

    def pick(self, x: Array, draws: Array) -> Array:
        """The rows of [tokens, width] that draw."""
        return x.at[draws].get(mode="promise_in_bounds")

    def head(self, picked: Array, norm: Array, table: Array) -> Array:
        """Float32 logits [rows, vocabulary]."""
        every = jnp.full(1, len(picked), jnp.int32)
        logits = _dot(self._norm(picked, norm, every), table, self._vocabulary, every)
        # A rank alone would copy what it has: XLA's CPU client takes no collective out.
        if lax.axis_size(AXIS) > 1:
            logits = lax.all_gather(logits, AXIS, axis=1, tiled=True)
        return logits[:, : self.vocab_size]

    def best(self, logits: Array) -> Array:
        """The likeliest token of each row, and the bits of its logit: int32 [2, rows].

        Not a number wins over all numbers.
        """
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        tops = lax.bitcast_convert_type(jnp.max(logits, axis=-1), jnp.int32)
        return jnp.stack((tokens, tops))

    @property
    def _vocabulary(self) -> int:
        """Rows of this rank's part of the embedding."""
        world: int = lax.axis_size(AXIS)
        return -(-self.vocab_size // world)

    def _qkv(self, y: Array, layer: Layer, step: Step) -> tuple[Array, Array, Array]:
        config = self.config
        outs = (config.heads + 2 * config.kv_heads) * config.head_dim
        joined = _linear(y, layer, "qkv", outs, _real(step)).astype(self.dtype)
        heads = joined.reshape(len(y), -1, config.head_dim)
        ends = (config.heads, config.heads + config.kv_heads)
        queries, keys, values = jnp.split(heads, ends, axis=1)
        if config.qk_norm:
            queries = self._norm(queries, layer["norm_q"])
            keys = self._norm(keys, layer["norm_k"])
        return _rotate(queries, step), _rotate(keys, step), values

    def _gated(self, y: Array, layer: Layer, step: Step) -> Array:
        """silu(gate) * up, where gate and up are linear."""
        if "gates" in layer:
            return jax_native.gated(y, layer["gates"], _real(step))
        joined = _linear(y, layer, "gated", 2 * self.config.inner, _real(step))
        gate, up = jnp.split(joined, 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(self.dtype)

    def _norm(self, x: Array, weight: Array, real: Array | None = None) -> Array:
        """Over the last dimension; ``real``: how many rows are no padding, if x has such [1]."""
        if self.native and real is not None and jax_native.norms(x.shape[-1]):
            return jax_native.norm(x, weight, real, self.config.epsilon)
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.config.epsilon)
        return (wide * scale).astype(self.dtype) * weight

    def _add(self, x: Array, y: Array, layer: Layer, kind: str, step: Step) -> Array:
        """The input plus a linear of which each rank has some columns; the bias is added once."""
        real, weight = _real(step), layer[kind]
        if weight.ndim > 2 and lax.axis_size(AXIS) == 1 and f"{kind}_bias" not in layer:
            return jax_native.added(y, weight, real, x)
        summed = self._sum(_dot(y, weight, self.config.width, real))
        if f"{kind}_bias" in layer:
            summed = summed + layer[f"{kind}_bias"].astype(jnp.float32)
        return x + summed.astype(self.dtype)

    def _sum(self, part: Array) -> Array:
        """The sum over ranks, in float32: fewer roundings depend on how many there are."""
        return lax.psum(part, AXIS) if lax.axis_size(AXIS) > 1 else part


def _real(step: Step) -> Array:
    """How many tokens are no padding [1]."""
    return step["starts"][-1:]


def _dot(x: Array, weight: Array, outs: int, real: Array) -> Array:
    """The product with the transposed weight [outs, in], in float32."""
    if weight.ndim > 2:
        return jax_native.product(x, weight, real, outs, jnp.float32)
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, weight, contract, precision=precision, preferred_element_type=jnp.float32
    )


def _linear(x: Array, layer: Layer, kind: str, outs: int, real: Array) -> Array:
    """A product and its bias, in float32."""
    found, bias = _dot(x, layer[kind], outs, real), layer.get(f"{kind}_bias")
    return found if bias is None else found + bias.astype(jnp.float32)


def _rotate(x: Array, step: Step) -> Array:
    """Turns the halves of each head [tokens, heads, head_dim] by the angles of its position."""
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = step["cos"][:, None], step["sin"][:, None]
    turned = jnp.concatenate((left * cos - right * sin, right * cos + left * sin), axis=-1)
    return turned.astype(x.dtype)
