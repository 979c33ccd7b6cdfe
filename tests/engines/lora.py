"""Small LoRA adapters for SmolLM2, as GGUF files."""

from pathlib import Path

import gguf
import numpy as np

RANK = 4
# Of SmolLM2-135M; attn_q is square.
WIDTH = 576
LAYERS = range(0, 30, 3)


def write_adapter(
    path: Path,
    strength: float,
    *,
    seed: int = 1,
    width: int = WIDTH,
    arch: str = "llama",
    kind: str = "lora",
    leave_out: str = "",
) -> Path:
    """An adapter of random directions; at ``strength`` 0 it changes nothing."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for layer in LAYERS:
        name = f"blk.{layer}.attn_q.weight"
        a = rng.standard_normal((RANK, width), np.float32) / np.float32(width**0.5)
        b = rng.standard_normal((width, RANK), np.float32) * np.float32(strength)
        for suffix, matrix in ((".lora_a", a), (".lora_b", b)):
            if suffix != leave_out:
                writer.add_tensor(name + suffix, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
