"""A llama.cpp engine that rounds nothing: float32 weights, a float32 cache, no flash attention.

Every way to compute something gives the same, up to the last digits of float32, so the contract can
be asked of settings for which llama.cpp promises no equality. Flash attention would round the keys.
"""

from pathlib import Path

from shards.engines import load
from shards.engines.base import Engine, EngineOptions
from tests.heavy.tiny_gguf import tiny_llama_gguf

# llama.cpp's own kernels for TF32 want matrices of 32 n by 32 m; with this, none is.
UNROUNDED_HEAD = 60


def make_llamacpp(model: Path, device: str, kv_tokens: int = 1024, **extra: object) -> Engine:
    """An engine for 12 sequences, with these engine options."""
    options = EngineOptions(
        model,
        "model",
        kv_tokens=kv_tokens,
        sequences_max=12,
        step_tokens_max=256,
        device=device,
        extra=tuple((key, str(value)) for key, value in extra.items()),
    )
    return load("llamacpp", options, lambda _fraction: None)


def make_unrounded(device: str, kv_tokens: int = 1024, **extra: object) -> Engine:
    """Float32 throughout: the cache as well, which flash attention would round."""
    model = tiny_llama_gguf(head_dim=UNROUNDED_HEAD)
    return make_llamacpp(model, device, kv_tokens, flash="off", cache="f32", **extra)
