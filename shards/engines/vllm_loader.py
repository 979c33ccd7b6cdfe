"""vLLM's own loader of weights, which tells how far it is."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from shards.engines.base import Progress
from shards.engines.vllm_setup import weight_bytes

LOAD_FORMAT = "roundhouse"


class _Listener:
    """Who is told how far loading is. vLLM makes the loader itself, so it cannot be handed over."""

    progress: Progress | None = None


def report_to(progress: Progress | None) -> None:
    """Whom the loader tells the fraction of weights that have been read."""
    _Listener.progress = progress


@register_model_loader(LOAD_FORMAT)
class ReportingLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads safetensors and PyTorch files."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(replace(load_config, load_format="auto"))

    def get_all_weights(
        self, model_config: ModelConfig, model: Any
    ) -> Generator[tuple[str, Any], None, None]:
        """All tensors with their names, one after the other."""
        total, seen = weight_bytes(Path(model_config.model)), 0
        for name, tensor in super().get_all_weights(model_config, model):
            yield name, tensor
            seen += tensor.nbytes
            if _Listener.progress and total:
                _Listener.progress(min(1.0, seen / total))
