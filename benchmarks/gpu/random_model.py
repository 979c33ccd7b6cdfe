"""Makes a Llama of a known size with random weights, to measure what a real one would cost.

    python benchmarks/gpu/random_model.py 8b FOLDER

Decoding reads every weight once whatever it says, so speed needs no real model. Shapes are those of
Llama 3.2 1B and Llama 3 8B; weights are bfloat16.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Layers, width, feed-forward width, heads, KV heads, elements of a head, vocabulary, tied head.
SIZES = {
    "tiny": (2, 128, 256, 4, 2, 32, 512, True),
    "1b": (16, 2048, 8192, 32, 8, 64, 128256, True),
    "8b": (32, 4096, 14336, 32, 8, 128, 128256, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    config = config_of(given.size)
    (given.folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(given.folder, config["vocab_size"])
    save_file(weights(config), given.folder / "model.safetensors", metadata={"format": "pt"})


def config_of(size: str) -> dict[str, Any]:
    layers, width, inner, heads, kv_heads, head_dim, vocabulary, tied = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": inner,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "vocab_size": vocabulary,
    }


def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn((rows, columns), device=device, dtype=torch.bfloat16)
        return (drawn * columns**-0.5).cpu()

    made = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = matrix(config["vocab_size"], width)
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        before = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{before}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        made.update({f"{before}{name}.weight": matrix(*size) for name, size in shapes.items()})
    return made


def write_tokenizer(folder: Path, size: int) -> None:
    """One of bytes, in which every other token says its number: whatever is drawn is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = [*alphabet, "<s>", "</s>"]
    vocabulary = {text: number for number, text in enumerate(first)}
    vocabulary |= {f"Ġ{number}": number for number in range(len(first), size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
