"""What the llama.cpp engine makes of the paths that it is given, and of a model's sizes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.engines.base import ModelError
from shards.engines.llama_devices import Device

KV_TOKENS_MAX = 32768
# Share of the memory that the KV cache may take unasked.
KV_MEMORY_SHARE = 0.25
# Bytes of 32 numbers, of which the quantised types make a block with a scale.
BLOCK = 32
BLOCK_BYTES = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
}
# A part of a divided cache takes its memory at once, so it is no longer than most requests need.
PART_TOKENS = 2048
# llama.cpp makes the parts so that this divides them.
_PART_STEP = 256


def adapter_file(name: str, path: Path) -> Path:
    """The file of a LoRA adapter: the one that is named, or the only one in a folder."""
    if not path.exists():
        raise ModelError(f"adapter {name}: {path} does not exist")
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    raise ModelError(
        f"adapter {name}: folder {path} holds {len(files)} GGUF files, and one is needed;"
        " convert_lora_to_gguf.py of llama.cpp makes it of an adapter for transformers"
    )


def kv_tokens_default(
    metadata: dict[str, Any], length_trained: int, memory_bytes: int, cache: str = "f16"
) -> int:
    """Tokens of KV cache when nobody says: what a quarter of the memory holds, within reason."""
    room = kv_tokens_room(metadata, memory_bytes, cache)
    return max(256, min(room, max(KV_TOKENS_MAX, length_trained // 8)) // 256 * 256)


def kv_tokens_room(metadata: dict[str, Any], memory_bytes: int, cache: str = "f16") -> int:
    """Tokens of KV cache for which there is memory, if its type is ``cache``."""
    return int(memory_bytes * KV_MEMORY_SHARE) // kv_bytes_per_token(metadata, cache)


def part_tokens(sequences: int, kv_tokens: int, room: int, length_trained: int) -> int:
    """Tokens of one sequence's part of a divided KV cache.

    That is its share of ``kv_tokens``; of 0, what most requests need, if ``room`` tokens are enough
    for it. Raises ``ModelError`` if the parts would be too small.
    """
    wanted = kv_tokens // sequences or min(PART_TOKENS, room // sequences)
    whole = min(wanted, _PART_STEP * -(-length_trained // _PART_STEP)) // _PART_STEP * _PART_STEP
    if not whole:
        raise ModelError(
            f"llamacpp: kv=split gives each of {sequences} sequences {wanted} tokens, and"
            f" {_PART_STEP} are the least: raise --kv-tokens or lower --sequences-max"
        )
    return whole


def layers_of(metadata: dict[str, Any]) -> int:
    """The model's blocks; its output is one layer more."""
    return int(metadata[f"{metadata['general.architecture']}.block_count"])


def kv_bytes_per_token(metadata: dict[str, Any], cache: str = "f16") -> int:
    """Bytes that one token takes in a KV cache of this type, over all layers."""
    arch = metadata["general.architecture"]
    layers = layers_of(metadata)
    heads = metadata[f"{arch}.attention.head_count"]
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
    width = int(metadata[f"{arch}.embedding_length"]) // max(_each(heads, 1))
    per_head = int(metadata.get(f"{arch}.attention.key_length", width))
    per_head += int(metadata.get(f"{arch}.attention.value_length", width))
    numbers = sum(_each(kv_heads, layers)) * per_head
    return max(1, numbers * BLOCK_BYTES[cache] // BLOCK)


def _each(value: Any, layers: int) -> list[int]:
    """One number per layer, of a number for all or a list."""
    return [int(part) for part in value] if isinstance(value, list) else [int(value)] * layers


def kv_memory_bytes(devices: Sequence[Device]) -> int:
    """Memory that a KV cache can be in: what is free on the devices, or else all of the machine."""
    if devices:
        return sum(device.memory_free() for device in devices)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
