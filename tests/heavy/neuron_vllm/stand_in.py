"""NxD Inference, as far as vllm-neuron touches it, around the toy model, on the CPU.

Its caches hold token ids: in slots, or in blocks where the plugin's tables say. So an answer is
right only if the plugin and vLLM have put every token where it belongs.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.engines.signatures.toy import logits

NAME = "neuronx_distributed_inference"
CONFIG = "neuron_config.json"
GRAPHS = "model.pt"


class Options:
    """Keeps what it is made with."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


class NeuronConfig(Options):
    """With the fields that the plugin reads and does not give."""

    chunked_prefill_config = None
    is_chunked_prefill = False
    attn_tkg_nki_kernel_enabled = False
    attn_block_tkg_nki_kernel_enabled = False


class Config:
    """What is saved beside the graphs."""

    def __init__(self, neuron_config: NeuronConfig, load_config: Any = None) -> None:
        self.neuron_config = neuron_config

    def to_json_string(self) -> str:
        return json.dumps({"neuron_config": vars(self.neuron_config)})


class Model:
    """Compiled when its folder has the two files; ``log`` is what was done, over all of them."""

    log: list[str] = []  # noqa: RUF012 - emptied by whoever reads it
    fault = ""

    def __init__(self, path: str, config: Config | None = None) -> None:
        if config is None:
            found = json.loads((Path(path) / CONFIG).read_text())
            config = Config(NeuronConfig(**found["neuron_config"]))
        self.config = config
        self._cells: dict[tuple[int, int], int] = {}

    @classmethod
    def get_neuron_config_cls(cls) -> type:
        return NeuronConfig

    @classmethod
    def get_config_cls(cls) -> type:
        return Config

    def compile(self, path: str) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / CONFIG).write_text(self.config.to_json_string())
        (Path(path) / GRAPHS).touch()
        self.log.append("compile")

    def load(self, path: str) -> None:
        if not (Path(path) / GRAPHS).is_file():
            raise ValueError(f"{path} does not exist")
        self.log.append("load")

    def __call__(self, input_ids: Any, **given: Any) -> Any:
        """Logits behind the last token of each row: batch x 1 x vocabulary."""
        import torch

        if self.fault:
            raise RuntimeError(self.fault)
        kind = "context" if int(given["position_ids"].min()) == 0 else "generation"
        self.log.append(f"{kind} {len(input_ids)}")
        rows = [self._row(input_ids, given, row) for row in range(len(input_ids))]
        return SimpleNamespace(logits=torch.from_numpy(np.array(rows))[:, None, :])

    def _row(self, input_ids: Any, given: dict[str, Any], row: int) -> np.ndarray:
        ids, positions = input_ids[row].tolist(), given["position_ids"][row].tolist()
        for position, token in zip(positions, ids, strict=True):
            if not self._is_shared(given, row, position, len(ids)):
                self._cells[self._cell(given, row, position)] = token
        known = range(positions[-1] + 1)
        return logits([self._cells[self._cell(given, row, position)] for position in known])

    def _is_shared(self, given: dict[str, Any], row: int, position: int, width: int) -> bool:
        """Whether a token of a prompt is in the cache already; then it may not be written again."""
        blocks = self.config.neuron_config.is_prefix_caching  # type: ignore[attr-defined]
        return bool(blocks and width > 1 and position < int(given["computed_context_lens"][row]))

    def _cell(self, given: dict[str, Any], row: int, position: int) -> tuple[int, int]:
        config: Any = self.config.neuron_config
        if not config.is_prefix_caching:
            return int(given["seq_ids"][row]), position
        block, place = divmod(position, config.pa_block_size)
        number = int(given["block_table"][row][block])
        assert 0 < number < config.pa_num_blocks
        return number, place


def _sampling(**given: Any) -> Any:
    import torch

    return torch.tensor([given[name] for name in ("top_k", "top_p", "temperature")]).T


def install() -> None:
    """Makes it importable."""
    offers: dict[str, dict[str, Any]] = {
        "": {},
        "models": {},
        "models.config": {
            "NeuronConfig": NeuronConfig,
            "ChunkedPrefillConfig": Options,
            "FusedSpecNeuronConfig": Options,
            "OnDeviceSamplingConfig": Options,
        },
        "modules": {},
        "modules.generation": {},
        "modules.generation.sampling": {"prepare_sampling_params": _sampling},
        "modules.lora_serving": {"LoraServingConfig": Options},
        "modules.padding": {"pad_tensor": None},
        "utils": {},
        "utils.constants": {"MODEL_TYPES": {"llama": {"causal-lm": Model}}},
        "utils.hf_adapter": {"load_pretrained_config": str},
    }
    for name, values in offers.items():
        full = f"{NAME}.{name}".rstrip(".")
        made = ModuleType(full)
        made.__path__ = []
        for key, value in values.items():
            setattr(made, key, value)
        sys.modules[full] = made
