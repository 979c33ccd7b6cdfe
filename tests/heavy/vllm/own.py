"""An engine that draws by vLLM's own sampler, and what tests do to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from shards.engines import load
from shards.engines.base import EngineOptions
from shards.engines.vllm_engine import VllmEngine
from tests.heavy.models import tiny_llama_folder

SEQUENCES = 32


def make() -> VllmEngine:
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=2048,
        sequences_max=SEQUENCES,
        step_tokens_max=512,
        threads=1,
        dtype="float32",
        extra=(("eager", "1"), ("sampler", "vllm")),
    )
    engine = load("vllm", options, lambda _fraction: None)
    assert isinstance(engine, VllmEngine)
    return engine


@contextmanager
def by_host(engine: VllmEngine) -> Iterator[None]:
    """Has the host draw everything meanwhile, as ``sampler=host`` does."""
    engine.reset()
    engine._processor._own = engine._steps._own = False
    yield
    engine._processor._own = engine._steps._own = True
    engine.reset()


def change_logits(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], object]
) -> None:
    """Changes the raw logits before anybody draws from them."""
    apply = engine._processor.apply

    def changed(logits: torch.Tensor) -> torch.Tensor:
        change(logits)
        return apply(logits)

    monkeypatch.setattr(engine._processor, "apply", changed)
