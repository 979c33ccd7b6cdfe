"""LoRA adapters with random weights, in the format of the peft library."""

import json
from pathlib import Path

import numpy as np

from shards.hf_folder import read_config
from tests.heavy.models import save_tensors

RANK = 4


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """An adapter of q_proj and v_proj that changes clearly what the model says."""
    config = read_config(model)
    width, head = config["hidden_size"], config["head_dim"]
    rows = {
        "q_proj": config["num_attention_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    draw = np.random.default_rng(100 + seed).standard_normal
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, count in rows.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = draw((RANK, width), np.float32) / width**0.5
            tensors[f"{place}.lora_B.weight"] = draw((count, RANK), np.float32)
    save_tensors(folder / "adapter_model.safetensors", tensors, dtype="float32")
    facts = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(rows),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return folder
