"""The compiled graphs of a model on AWS Neuron, behind one face for both libraries that make them.

A graph has one shape. There are graphs of two kinds: *context encoding* takes the whole prompt of
one sequence, right-padded to a bucket, and *token generation* takes one token of every slot, and
reads as much of the cache as its bucket says. Each slot is one line of a static KV cache.

- ``optimum``: ``optimum-neuron``, with one bucket of each kind. Its wrapper pads by itself. It can
  draw on the device, among a few of the likeliest tokens, and then gives tokens and no logits.
- ``nxdi``: NxD Inference, with as many buckets as it was compiled for. Its wrapper takes the first
  bucket that is *larger* than its input is wide, or the last if the input fits exactly, so an input
  must be one narrower than its bucket. What lies between it pads with position 1. Its ``forward``
  takes any input with a position 0 for a prompt, also a token for each slot of which one is empty;
  so token generation is called by its own name.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import ModelError
from shards.engines.self_model import load_package, one_line
from shards.filters import Floats
from shards.pages import page

Ints = NDArray[np.int32]
Found = NDArray[Any]
"""Float32 logits [rows, vocabulary], or drawn tokens [rows] of models that draw on the device."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sizes of the graphs of one kind, ascending. ``strict``: all but the last hold one less."""

    sizes: tuple[int, ...]
    strict: bool

    def width(self, length: int) -> int:
        """How wide an input of that length must be padded, so that it meets the smallest graph."""
        for width in self.widths:
            if length <= width:
                return width
        raise AssertionError(f"{length} tokens do not fit into the graphs {self.sizes}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that occur, ascending: one for each graph."""
        less = 1 if self.strict else 0
        return (*(size - less for size in self.sizes[:-1]), self.sizes[-1])


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the model was compiled for. ``length`` is a slot's, in tokens.

    If ``draws_among`` is not 0, the device draws, among so many of the likeliest tokens.
    """

    slots: int
    length: int
    context: Buckets
    generation: Buckets
    dtype: str
    draws_among: int = 0


class Graphs(ABC):
    """The compiled model. Arrays are int32.

    ``sampling`` is float32 [rows, 3]: top_k, top_p and temperature of each row, without effect
    where the device does not draw.
    """

    shapes: Shapes
    prompt_min = 2
    """Shorter prompts are left to token generation: the libraries find a prompt's end where its
    position is largest, and that must be nowhere in the padding."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._torch = load_package("neuron", "torch", "")
        self._model = model
        self._vocab_size = vocab_size

    @abstractmethod
    def encode(
        self, tokens: Ints, lengths: Sequence[int], slots: Sequence[int], sampling: Floats
    ) -> Found:
        """Computes whole prompts, [rows, width of a bucket], and fills their slots.

        Returns what is found behind the last token of each.
        """

    @abstractmethod
    def generate(self, tokens: Ints, positions: Ints, width: int, sampling: Floats) -> Found:
        """Computes one token of every slot, [slots] each, at its position.

        Its key and value are written there whether or not anybody wants what is found behind it.
        ``width`` is one of a bucket's, and above every position.
        """

    def _call(self, **arrays: NDArray[Any]) -> Any:
        """Calls the model with tensors of the arrays."""
        torch = self._torch
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            return self._model.forward(**tensors)

    def _logits(self, found: Any) -> Floats:
        """Logits [rows, 1, vocabulary as compiled] as an array without the padding."""
        last = found[:, -1, : self._vocab_size]
        values: Floats = last.to(device="cpu", dtype=self._torch.float32).numpy()
        return values


def _positions(lengths: Sequence[int], width: int) -> Ints:
    """0, 1, ... for each row, and 0 behind its end: the library looks for the largest one."""
    counted = np.tile(np.arange(width, dtype=np.int32), (len(lengths), 1))
    counted[counted >= np.array(lengths, np.int32)[:, None]] = 0
    return counted


class OptimumGraphs(Graphs):
    """``optimum.neuron.NeuronModelForCausalLM``."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__(model, vocab_size)
        config = model.neuron_config
        # The wrapper would fill up a smaller batch with writes into slots that it does not own.
        if not config.continuous_batching or config.max_batch_size != config.batch_size:
            raise ModelError(
                "neuron: the model was not compiled for continuous batching: export it with"
                " continuous_batching"
            )
        if config.output_logits:
            raise ModelError("neuron: models with output_logits are not served: export it without")
        self.shapes = Shapes(
            slots=config.batch_size,
            length=config.sequence_length,
            context=Buckets((config.max_context_length,), strict=False),
            generation=Buckets((config.sequence_length,), strict=False),
            dtype=_dtype(config),
            draws_among=_draws_among(config, vocab_size),
        )

    def encode(
        self, tokens: Ints, lengths: Sequence[int], slots: Sequence[int], sampling: Floats
    ) -> Found:
        """See ``Graphs``."""
        found = self._call(
            input_ids=tokens,
            position_ids=_positions(lengths, tokens.shape[1]),
            seq_ids=np.array(slots, np.int32),
            sampling_params=sampling,
        )
        return self._found(found)

    def generate(self, tokens: Ints, positions: Ints, width: int, sampling: Floats) -> Found:
        """See ``Graphs``."""
        found = self._call(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            seq_ids=np.arange(len(tokens), dtype=np.int32),
            sampling_params=sampling,
        )
        return self._found(found)

    def _found(self, found: Any) -> Found:
        if not self.shapes.draws_among:
            return self._logits(found)
        tokens: Found = found.to(device="cpu", dtype=self._torch.int64).numpy()
        return tokens.reshape(-1)


class NxdiGraphs(Graphs):
    """``NeuronBaseForCausalLM`` of ``neuronx_distributed_inference``, with a cache of slots."""

    # The wrapper pads with position 1, the largest one of a prompt of two tokens.
    prompt_min = 3

    def __init__(self, model: Any, vocab_size: int) -> None:
        super().__init__(model, vocab_size)
        config = model.neuron_config
        if config.on_device_sampling_config is not None:
            raise ModelError(
                "neuron: the model was compiled with sampling on the device: compile it with"
                " on_device_sampling_config=None"
            )
        if config.is_block_kv_layout or config.async_mode:
            raise ModelError("neuron: models with is_block_kv_layout or async_mode are not served")
        if config.enable_fused_speculation or config.is_medusa or config.speculation_length:
            raise ModelError(
                "neuron: models compiled for speculation are not served: compile it without"
            )
        if not config.is_continuous_batching or config.ctx_batch_size != 1:
            raise ModelError(
                "neuron: the model was not compiled for continuous batching: compile it with"
                " is_continuous_batching=True and ctx_batch_size=1"
            )
        if not config.tkg_batch_size == config.batch_size == config.max_batch_size:
            raise ModelError("neuron: batch_size, tkg_batch_size and max_batch_size differ")
        self.shapes = Shapes(
            slots=config.batch_size,
            length=config.seq_len,
            context=_buckets(config.context_encoding_buckets, config.max_context_length),
            generation=_buckets(config.token_generation_buckets, config.seq_len),
            dtype=_dtype(config),
        )

    def encode(
        self, tokens: Ints, lengths: Sequence[int], slots: Sequence[int], sampling: Floats
    ) -> Found:
        """See ``Graphs``."""
        places = np.arange(tokens.shape[1], dtype=np.int32)[None, :]
        found = self._call(
            input_ids=tokens,
            attention_mask=(places < np.array(lengths)[:, None]).astype(np.int32),
            position_ids=_positions(lengths, tokens.shape[1]),
            seq_ids=np.array(slots, np.int32),
            sampling_params=sampling,
        )
        return self._logits(found.logits)

    def generate(self, tokens: Ints, positions: Ints, width: int, sampling: Floats) -> Found:
        """See ``Graphs``. The mask covers what is in the cache; its width picks the graph."""
        places = np.arange(width, dtype=np.int32)[None, :]
        torch = self._torch
        given = {
            "input_ids": tokens[:, None],
            "attention_mask": (places < positions[:, None]).astype(np.int32),
            "position_ids": positions[:, None],
            "seq_ids": np.arange(len(tokens), dtype=np.int32),
            "sampling_params": sampling,
        }
        tensors = [torch.from_numpy(array) for array in given.values()]
        with torch.no_grad():
            # No hidden states before it, and no adapters.
            found = self._model.token_generation_model(*tensors, None, None)
        return self._logits(found)


def _draws_among(config: Any, vocab_size: int) -> int:
    """Among how many of the likeliest tokens the device draws; a limit below 1 is none."""
    if not config.on_device_sampling:
        return 0
    return min(config.max_topk, vocab_size) if config.max_topk > 0 else vocab_size


def _buckets(given: Sequence[int] | None, largest: int) -> Buckets:
    """The buckets of one kind; the library adds none beyond those that were given."""
    return Buckets(tuple(sorted(given)) if given else (largest,), strict=True)


def _dtype(config: Any) -> str:
    return str(config.torch_dtype).rpartition(".")[2]


def load_optimum(path: str, vocab_size: int) -> Graphs:
    """Loads a folder that ``optimum-cli export neuron`` wrote. Raises ``ModelError``."""
    package = load_package("neuron", "optimum.neuron", _HINT)
    try:
        model = package.NeuronModelForCausalLM.from_pretrained(path)
    except Exception as error:
        raise ModelError(f"neuron: {path} did not load: {one_line(error)}") from error
    return OptimumGraphs(model, vocab_size)


def load_nxdi(path: str, model_type: str, vocab_size: int) -> Graphs:
    """Loads a folder that NxD Inference compiled. Raises ``ModelError``."""
    package = load_package("neuron", "neuronx_distributed_inference.utils.constants", _HINT)
    kinds = package.MODEL_TYPES.get(model_type, {})
    if "causal-lm" not in kinds:
        raise ModelError(f"neuron: NxD Inference has no causal language model {model_type}")
    try:
        model = kinds["causal-lm"](path)
        model.load(path)
    except Exception as error:
        raise ModelError(f"neuron: {path} did not load: {one_line(error)}") from error
    return NxdiGraphs(model, vocab_size)


_HINT = f"see {page('engines/neuron.md')}; it needs an AWS Inferentia or Trainium instance"
