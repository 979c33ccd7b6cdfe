"""The Llama family as numbers: what ``config.json`` says, checked, in the words of the JAX engine.

Llama 2 and 3, SmolLM2, Mistral, Qwen 2, 2.5 and 3 are one block: RMS norm, rotary attention with
grouped keys and values, a gated SiLU layer. They differ in biases, in norms of queries and keys
(Qwen 3), in sliding windows and in how rotation frequencies are stretched. Whatever is outside is
refused by name. This module needs no JAX.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.engines import other_ranks
from shards.engines.base import ModelError
from shards.filters import Floats

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_QK_NORM = ("Qwen3ForCausalLM",)
# Only these look at ``use_sliding_window`` and the number of layers that have none.
_OPTIONAL_WINDOW = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_LAYER_KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """One model. ``windows`` has for each layer how many tokens it sees, itself included; 0: all.

    ``frequencies`` are the angles in radians that one position turns each of the head_dim / 2
    pairs of a head.
    """

    architecture: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    length_max: int
    epsilon: float
    tied: bool
    qk_norm: bool
    windows: tuple[int, ...]
    frequencies: tuple[float, ...]
    stored_dtype: str

    def local(self, world: int) -> "LlamaConfig":
        """What one of ``world`` ranks computes: its share of the heads and of the inner layer.

        Raises ``ModelError`` if the model cannot be cut into so many parts.
        """
        for what, count in (
            ("query heads", self.heads),
            ("KV heads", self.kv_heads),
            ("inner columns", self.inner),
        ):
            if count % world:
                raise ModelError(
                    f"jax: the model's {count} {what} cannot be spread over {world} ranks;"
                    f" {other_ranks(self.heads, self.kv_heads, self.inner)}"
                )
        return replace(
            self,
            heads=self.heads // world,
            kv_heads=self.kv_heads // world,
            inner=self.inner // world,
        )


def read(config: Mapping[str, Any]) -> LlamaConfig:
    """The model of a ``config.json``. Raises ``ModelError`` if it is not of the family."""
    names = config.get("architectures") or ["unknown"]
    architecture = str(names[0])
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"jax: the model is a {architecture}; this engine has {', '.join(ARCHITECTURES)}:"
            " take the engine torch"
        )
    _refuse_variants(config)
    try:
        return _read(architecture, config)
    except KeyError as missing:
        raise ModelError(f"jax: the model's config.json has no {missing.args[0]}") from None


def _refuse_variants(config: Mapping[str, Any]) -> None:
    """What the named architectures may say that this block does not do."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"jax: the activation {activation} is not supported, only silu")
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"jax: weights quantised by {kind} are not supported; take a GGUF file")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("jax: heads that are rotated in part are not supported")


def _read(architecture: str, config: Mapping[str, Any]) -> LlamaConfig:
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    layers = int(config["num_hidden_layers"])
    return LlamaConfig(
        architecture=architecture,
        layers=layers,
        width=int(config["hidden_size"]),
        inner=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        length_max=int(config["max_position_embeddings"]),
        epsilon=float(config["rms_norm_eps"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture in _QK_NORM,
        windows=_windows(architecture, config, layers),
        frequencies=tuple(float(angle) for angle in _frequencies(config, head_dim)),
        stored_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _windows(architecture: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = int(config.get("sliding_window") or 0)
    if architecture in _OPTIONAL_WINDOW and not config.get("use_sliding_window", False):
        window = 0
    if architecture not in ("MistralForCausalLM", *_OPTIONAL_WINDOW):
        window = 0
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 0)) if architecture in _OPTIONAL_WINDOW else 0
        return tuple(window if layer >= first else 0 for layer in range(layers))
    unknown = sorted(set(kinds) - set(_LAYER_KINDS))
    if unknown or len(kinds) != layers:
        what = f"the layer type {unknown[0]}" if unknown else "layer_types of another length"
        raise ModelError(f"jax: {what} is not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _frequencies(config: Mapping[str, Any], head_dim: int) -> Floats:
    """Rotation frequencies, computed in float32 as the ``transformers`` library does.

    Sources: arXiv:2104.09864 (rotation); ``modeling_rope_utils.py`` of that library for "linear"
    and "llama3". ``rope_divisors`` are llama.cpp's form of the latter.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain: Floats = (1.0 / np.power(np.float32(theta), steps)).astype(np.float32)
    if config.get("rope_divisors"):
        return np.divide(plain, np.array(config["rope_divisors"], np.float32))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(rope["factor"])
    if kind == "llama3":
        return _stretched(plain, rope)
    raise ModelError(f"jax: rotary embeddings of the kind {kind} are not supported")


def _stretched(plain: Floats, rope: Mapping[str, Any]) -> Floats:
    """Llama 3.1: slow rotations by ``factor`` slower, fast ones as they are, smooth between."""
    factor, length = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = length * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    found: Floats = ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32)
    return found
