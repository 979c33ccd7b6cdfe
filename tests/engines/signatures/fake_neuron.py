"""The models of both Neuron libraries with the recorded signatures, and a little of ``torch``.

What a slot holds is a line of token ids, and the logits behind a position are the toy's for the
tokens up to it, so a token in the wrong slot or place changes what is drawn. As in the libraries, a
prompt's end is where its largest position is, and every line of a batch is written to.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.engines.signatures.strict import bind, recorded
from tests.engines.signatures.toy import VOCAB, logits

# The compiled head is padded to a multiple of the ranks.
PADDED_VOCAB = VOCAB + 7
TOKEN_CALL = "NeuronBaseForCausalLM._get_model_outputs.token_generation_model"


class Tensor:
    """An array that answers as far as the adapter asks."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, key: Any) -> "Tensor":
        return Tensor(self.array[key])

    def to(self, *, device: str, dtype: Any) -> "Tensor":
        assert device == "cpu"
        return Tensor(self.array.astype(dtype))

    def numpy(self) -> np.ndarray:
        return self.array


def torch_module() -> ModuleType:
    """``torch``."""
    made = ModuleType("torch")
    made.float32 = np.float32  # type: ignore[attr-defined]
    made.from_numpy = Tensor  # type: ignore[attr-defined]
    made.int64 = np.int64  # type: ignore[attr-defined]
    made.no_grad = nullcontext  # type: ignore[attr-defined]
    return made


class Slots:
    """The cache and both kinds of graphs."""

    def __init__(self, slots: int, length: int) -> None:
        self.lines = np.full((slots, length), -1, np.int64)

    def prompt(self, tokens: np.ndarray, positions: np.ndarray, slot: int) -> np.ndarray:
        assert tokens.ndim == 1
        self.lines[slot, : len(tokens)] = tokens
        end = int(positions.argmax())
        assert (positions == positions[end]).sum() == 1, "which of equal ones is found is not said"
        return self._logits(tokens[: end + 1])

    def token(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        found = []
        for slot, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self.lines[slot, position] = token
            found.append(self._logits(self.lines[slot, : position + 1]))
        return np.stack(found)

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        padded = np.full(PADDED_VOCAB, 1e9, np.float32)
        padded[:VOCAB] = logits([int(token) for token in tokens])
        return padded


class OptimumModel:
    """``NxDModelForCausalLM`` of optimum-neuron."""

    def __init__(self, slots: int = 4, length: int = 128, context: int = 128, **given: Any) -> None:
        entries = {
            "batch_size": slots,
            "max_batch_size": slots,
            "sequence_length": length,
            "max_context_length": context,
            "continuous_batching": True,
            "on_device_sampling": False,
            "max_topk": 64,
            "output_logits": False,
            "torch_dtype": "torch.bfloat16",
            **given,
        }
        known = recorded("optimum", "functions", "NxDNeuronConfig.__init__")["positional"]
        assert entries.keys() <= set(known)
        self.neuron_config = SimpleNamespace(**entries)
        self.slots = Slots(slots, length)
        self.calls: list[tuple[str, int]] = []
        self.sampled: list[np.ndarray] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = bind("optimum", "NxDModelForCausalLM.forward", args, kwargs)
        tokens, positions = given["input_ids"].array, given["position_ids"].array
        lines = given["seq_ids"].array
        sampling = given["sampling_params"].array
        assert sampling.shape == (len(lines), 3)
        if tokens.shape[-1] > 1 and not positions.min():
            pad = ((0, 0), (0, self.neuron_config.max_context_length - tokens.shape[1]))
            tokens = np.pad(tokens, pad)
            positions = np.pad(positions, pad, constant_values=1)
            self.calls.append(("context", tokens.shape[1]))
            found = [
                self.slots.prompt(tokens[row], positions[row], slot)
                for row, slot in enumerate(lines)
            ]
            return self._answer(np.stack(found), sampling)
        self.calls.append(("generation", self.neuron_config.sequence_length))
        assert lines.tolist() == list(range(self.neuron_config.batch_size))
        return self._answer(self.slots.token(tokens[:, 0], positions[:, 0]), sampling)

    def _answer(self, found: np.ndarray, sampling: np.ndarray) -> Tensor:
        if not self.neuron_config.on_device_sampling:
            return Tensor(found[:, None])
        self.sampled.append(sampling)
        top_k, top_p, temperature = sampling.T
        assert ((top_k == -1) | ((top_k > 0) & (top_k <= self.neuron_config.max_topk))).all()
        assert ((top_p > 0) & (top_p <= 1)).all()
        assert (temperature > 0).all()
        # The second likeliest where more than one may be drawn: it is plain who has drawn.
        order = np.argsort(-found[:, :VOCAB], axis=1)
        return Tensor(np.where(top_k == 1, order[:, 0], order[:, 1]))


class NxdiModel:
    """``NeuronBaseForCausalLM`` of NxD Inference."""

    loaded: Any = None

    def __init__(
        self,
        slots: int = 4,
        context: Sequence[int] = (32, 64, 128),
        generation: Sequence[int] = (64, 128),
        **given: Any,
    ) -> None:
        entries = {
            "batch_size": slots,
            "tkg_batch_size": slots,
            "max_batch_size": slots,
            "ctx_batch_size": 1,
            "seq_len": generation[-1],
            "max_context_length": context[-1],
            "is_continuous_batching": True,
            "is_block_kv_layout": False,
            "async_mode": False,
            "on_device_sampling_config": None,
            "enable_fused_speculation": False,
            "is_medusa": False,
            "speculation_length": 0,
            "context_encoding_buckets": list(context),
            "token_generation_buckets": list(generation),
            "torch_dtype": "torch.float32",
            **given,
        }
        assert entries.keys() <= set(recorded("nxdi", "options", "NeuronConfig.__init__"))
        self.neuron_config = SimpleNamespace(**entries)
        self.slots = Slots(slots, generation[-1])
        self.calls: list[tuple[str, int]] = []

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        given = bind("nxdi", "NeuronBaseForCausalLM.forward", args, kwargs)
        tokens, positions = given["input_ids"].array, given["position_ids"].array
        mask, lines = given["attention_mask"].array, given["seq_ids"].array
        # A prompt, whatever its width: see ``NeuronBaseForCausalLM._is_prefill``.
        if positions.min() == 0:
            return SimpleNamespace(logits=self._context(tokens, mask, positions, lines))
        logits = self.token_generation_model(
            *(given[name] for name in recorded("nxdi", "calls", TOKEN_CALL)[:5]), None, None
        )
        return SimpleNamespace(logits=logits)

    def _context(
        self, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray, lines: np.ndarray
    ) -> Tensor:
        bucket = first_fit(self.neuron_config.context_encoding_buckets, mask.shape[1])
        self.calls.append(("context", bucket))
        pad = ((0, 0), (0, bucket - tokens.shape[1]))
        tokens = np.pad(tokens, pad)
        positions = np.pad(positions, pad, constant_values=1)
        found = [
            self.slots.prompt(tokens[row], positions[row], slot) for row, slot in enumerate(lines)
        ]
        return Tensor(np.stack(found)[:, None])

    def token_generation_model(self, *args: Tensor | None) -> Tensor:
        """``ModelWrapper.forward`` of that graph."""
        given = dict(zip(recorded("nxdi", "calls", TOKEN_CALL), args, strict=True))
        assert given.pop("prev_hidden") is given.pop("adapter_ids") is None
        arrays = {name: value.array for name, value in given.items() if value is not None}
        assert len(arrays) == len(given)
        tokens, positions = arrays["input_ids"], arrays["position_ids"]
        mask, lines = arrays["attention_mask"], arrays["seq_ids"]
        assert arrays["sampling_params"].shape == (len(lines), 3)
        config = self.neuron_config
        bucket = first_fit(config.token_generation_buckets, mask.shape[1])
        self.calls.append(("generation", bucket))
        assert lines.tolist() == list(range(config.batch_size))
        assert (mask.sum(axis=1) == positions[:, 0]).all()
        assert positions.max() < bucket
        return Tensor(self.slots.token(tokens[:, 0], positions[:, 0])[:, None])


def first_fit(buckets: Sequence[int], width: int) -> int:
    """The bucket that the library's wrapper takes; see ``ModelWrapper._get_seq_bucket``."""
    for bucket in buckets:
        if width < bucket:
            return bucket
    if width > buckets[-1]:
        raise ValueError(f"Input len {width} exceeds largest bucket ({buckets[-1]})")
    return buckets[-1]
