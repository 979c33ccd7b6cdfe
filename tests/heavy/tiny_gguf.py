"""Llama folders as GGUF files with the very same weights, for llama.cpp.

Only ``numpy`` and ``gguf`` are needed. What is written is what llama.cpp's own converter would
write, but for the names of tokens: of a byte tokenizer only the sizes matter.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from tests.heavy.models import LAYER_NAMES, TOP_NAMES, made_once, tiny_llama_folder

# Raise it when a file made by an older version of this file must not be used any more.
VERSION = 1
# By the name in safetensors: how numpy reads it, which has no bfloat16, and how GGUF names it.
_TYPES = {
    "F32": (np.float32, gguf.GGMLQuantizationType.F32),
    "BF16": (np.uint16, gguf.GGMLQuantizationType.BF16),
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}
_LAYER_NAMES = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
_TOP_NAMES = {theirs: ours for ours, theirs in TOP_NAMES.items()}
_BYTES = 256


def tiny_llama_gguf(**shape: Any) -> Path:
    """The model of ``models.tiny_llama_folder`` as a GGUF file, in float32."""
    source = tiny_llama_folder(**shape)
    name = f"{source.name}-gguf{VERSION}"
    return made_once(name, lambda folder: write_gguf(source, folder / "tiny.gguf")) / "tiny.gguf"


def write_gguf(folder: Path, path: Path) -> None:
    """Writes a Llama of one safetensors file, in float32 or bfloat16, with a tokenizer of bytes."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    for name, kind, values in _tensors(folder / "model.safetensors"):
        _add_tensor(writer, config, name, kind, values)
    _add_shape(writer, config)
    writer.add_file_type(_FILE_TYPES[config["dtype"]])
    _add_tokenizer(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name, type and values of each tensor of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, told in header.items():
        kind, shape = told["dtype"], tuple(told["shape"])
        start = 8 + length + told["data_offsets"][0]
        yield (
            name,
            kind,
            np.fromfile(path, _TYPES[kind][0], math.prod(shape), offset=start).reshape(shape),
        )


def _add_tensor(
    writer: gguf.GGUFWriter, config: dict[str, Any], name: str, kind: str, values: NDArray[Any]
) -> None:
    if values.ndim == 1:
        # llama.cpp multiplies by norms in float32 alone.
        if kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(_gguf_name(name), values)
        return
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    if part in heads:
        values = permuted(values, config[heads[part]])
    raw = np.ascontiguousarray(values).view(np.uint8)  # rows of bytes, as the writer wants them
    writer.add_tensor(_gguf_name(name), raw, raw_dtype=_TYPES[kind][1])


def _gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{_LAYER_NAMES['.'.join(parts[2:])]}.weight"
    return f"{_TOP_NAMES[parts[0]]}.weight"


def permuted(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Interleaves the halves that rotary embeddings turn, as llama.cpp has them."""
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The 256 bytes, ``<s>``, ``</s>`` and fillers, as ``models.write_byte_tokenizer`` has them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = config["vocab_size"] - _BYTES - 2
    special = ["<s>", "</s>", *(f"<filler_{number}>" for number in range(fillers))]
    kinds = [gguf.TokenType.NORMAL] * _BYTES + [gguf.TokenType.CONTROL] * len(special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(letters + special)
    writer.add_token_types([int(kind) for kind in kinds])
    # llama.cpp wants merges, and a GGUF file has no empty array. This one makes no known token, so
    # that nothing is merged.
    writer.add_token_merges([f"{letters[0]} {letters[0]}"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
