"""Engines and helpers that the torch tests share."""

from pathlib import Path

from shards.engines import load
from shards.engines.base import EngineOptions
from shards.engines.torch_engine import TorchEngine


def make(folder: Path, **changes: object) -> TorchEngine:
    """A torch engine; ``extra`` is a dict of engine options."""
    extra = changes.pop("extra", {})
    assert isinstance(extra, dict)
    fields = {"kv_tokens": 1024, "sequences_max": 8, "step_tokens_max": 256, "threads": 1}
    options = EngineOptions(
        folder,
        "model",
        extra=tuple((key, str(value)) for key, value in extra.items()),
        **{**fields, **changes},  # type: ignore[arg-type]
    )
    engine = load("torch", options, lambda _fraction: None)
    assert isinstance(engine, TorchEngine)
    return engine
