"""Tiny random models of the whole Llama family: what differs from Llama, each in one of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.heavy.models import save_tensors, tiny_llama_folder

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 32, 3
WIDTH = HEADS * HEAD_DIM
INNER = 3 * WIDTH
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QKV_BIAS = {
    "self_attn.q_proj.bias": WIDTH,
    "self_attn.k_proj.bias": KV_HEADS * HEAD_DIM,
    "self_attn.v_proj.bias": KV_HEADS * HEAD_DIM,
}
# Entries of config.json, and vectors that each layer has more than Llama, with their lengths.
MEMBERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama3": ({"rope_scaling": _LLAMA3, "rope_theta": 500.0}, {}),
    "llama-linear": ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, {}),
    "llama-biased": (
        {"attention_bias": True, "mlp_bias": True},
        {
            **_QKV_BIAS,
            "self_attn.o_proj.bias": WIDTH,
            "mlp.gate_proj.bias": INNER,
            "mlp.up_proj.bias": INNER,
            "mlp.down_proj.bias": WIDTH,
        },
    ),
    "mistral": (
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": 16,
        },
        {},
    ),
    "qwen2": ({**_QWEN2}, _QKV_BIAS),
    "qwen2-window": (
        {
            **_QWEN2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
        _QKV_BIAS,
    ),
    "qwen3": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        {"self_attn.q_norm.weight": HEAD_DIM, "self_attn.k_norm.weight": HEAD_DIM},
    ),
}


def member_folder(name: str, target: Path) -> Path:
    """Writes that model to a new folder; the same bytes wherever it is done."""
    config, vectors = MEMBERS[name]
    base = tiny_llama_folder(HEADS, KV_HEADS, HEAD_DIM, LAYERS, **config)
    shutil.copytree(base, target)
    if not vectors:
        return target
    random = np.random.default_rng(2)
    more = {
        f"model.layers.{layer}.{vector}": _vector(random, vector, length)
        for layer in range(LAYERS)
        for vector, length in vectors.items()
    }
    save_tensors(target / "more.safetensors", more, dtype="float32")
    # A file of the usual name would be taken for all there is.
    first = (target / "model.safetensors").rename(target / "first.safetensors")
    with first.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    places = {name: first.name for name in header if name != "__metadata__"}
    places |= dict.fromkeys(more, "more.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def _vector(random: np.random.Generator, name: str, length: int) -> Any:
    drawn = 0.5 * random.standard_normal(length).astype(np.float32)
    return drawn if name.endswith("bias") else 1 + drawn


def prompt() -> list[int]:
    """Longer than the windows, and than the context before the rotations were stretched."""
    return [int(token) for token in np.random.default_rng(8).integers(0, 256, 48)]
