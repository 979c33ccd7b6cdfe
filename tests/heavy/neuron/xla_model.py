"""A Llama on torch-xla with the faces of the two Neuron libraries' models.

It keeps what their wrappers promise, and no more: static shapes, one graph per bucket, a cache of
slots, padding in the same places with the same values, a prompt's end found by the largest
position, and key and value written for every line of a batch, whoever it belongs to. The rules are
those of the files in ``tests/engines/signatures/neuron.json``.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch_xla

Tensor = torch.Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a float32 file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[start:end], np.float32).reshape(entry["shape"])
        found[name] = torch.from_numpy(array.copy())
    return found


class Llama:
    """The graphs' contents: one function for prompts, one for single tokens, and the cache."""

    def __init__(self, folder: Path, slots: int, length: int) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.device = torch_xla.device()
        weights = read_safetensors(folder / "model.safetensors")
        self.weights = {name: value.to(self.device) for name, value in weights.items()}
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.dim = self.config["head_dim"]
        shape = (slots, self.kv_heads, length, self.dim)
        layers = self.config["num_hidden_layers"]
        zeros = torch.zeros(shape)
        self.keys = [zeros.to(self.device) for _ in range(layers)]
        self.values = [zeros.to(self.device) for _ in range(layers)]
        places = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        self.frequencies = (self.config["rope_theta"] ** -places).to(self.device)
        torch_xla.sync(wait=True)

    def prompt(self, tokens: Tensor, positions: Tensor, slot: Tensor) -> Tensor:
        """One padded prompt [1, width]: fills its slot, and gives the logits behind its end."""
        width = tokens.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
        tokens, positions, slot, causal = self._to_device(tokens, positions, slot.long(), causal)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for cache, new in ((self.keys, key), (self.values, value)):
                line = cache[layer].index_select(0, slot)
                line = torch.cat([new, line[:, :, width:]], dim=2)
                cache[layer] = cache[layer].index_copy(0, slot, line)
            return self._attention(query, key, value, causal)

        hidden = self._layers(tokens, positions, attend)
        end = torch.max(positions, dim=1, keepdim=True).indices
        end = end[:, :, None].expand(1, 1, hidden.shape[-1])
        return self._finish(torch.gather(hidden, 1, end))

    def token(self, tokens: Tensor, positions: Tensor, slots: Tensor, width: int) -> Tensor:
        """One token of every slot [slots, 1], reading ``width`` places of the cache."""
        tokens, positions, slots = self._to_device(tokens, positions, slots.long())
        places = torch.arange(width, device=self.device)[None, :]
        seen = (places <= positions)[:, None, None, :]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            where = positions[:, :, None, None].expand(-1, self.kv_heads, 1, self.dim)
            for cache, new in ((self.keys, key), (self.values, value)):
                lines = cache[layer].index_select(0, slots)
                cache[layer] = cache[layer].index_copy(0, slots, lines.scatter(2, where, new))
            keys, values = (
                cache[layer].index_select(0, slots)[:, :, :width]
                for cache in (self.keys, self.values)
            )
            return self._attention(query, keys, values, seen)

        return self._finish(self._layers(tokens, positions, attend))

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.to(self.device) for tensor in tensors]

    def _layers(self, tokens: Tensor, positions: Tensor, attend: object) -> Tensor:
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        angles = positions[:, :, None].float() * self.frequencies
        turn = torch.cat([angles, angles], dim=-1)[:, None]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normal = self._norm(hidden, prefix + "input_layernorm.weight")
            query, key, value = (
                self._split(normal @ self.weights[f"{prefix}self_attn.{name}_proj.weight"].T)
                for name in "qkv"
            )
            mixed = attend(layer, _rotate(query, turn), _rotate(key, turn), value)
            mixed = mixed.transpose(1, 2).flatten(2)
            hidden = hidden + mixed @ self.weights[prefix + "self_attn.o_proj.weight"].T
            normal = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            gate, up = (
                normal @ self.weights[f"{prefix}mlp.{name}_proj.weight"].T
                for name in ("gate", "up")
            )
            inner = torch.nn.functional.silu(gate) * up
            hidden = hidden + inner @ self.weights[prefix + "mlp.down_proj.weight"].T
        return hidden

    def _split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.dim)).transpose(1, 2)

    def _attention(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        repeats = self.heads // self.kv_heads
        keys = keys.repeat_interleave(repeats, dim=1)
        values = values.repeat_interleave(repeats, dim=1)
        scores = query @ keys.transpose(2, 3) / self.dim**0.5
        return scores.masked_fill(~seen, -1e30).softmax(-1) @ values

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return hidden * scale * self.weights[name]

    def _finish(self, hidden: Tensor) -> Tensor:
        logits = self._norm(hidden, "model.norm.weight") @ self.weights["lm_head.weight"].T
        # One graph: what was recorded since the last one runs now.
        torch_xla.sync()
        return logits.cpu()


def _rotate(states: Tensor, turn: Tensor) -> Tensor:
    low, high = states.chunk(2, dim=-1)
    return states * turn.cos() + torch.cat([-high, low], dim=-1) * turn.sin()


class OptimumModel:
    """The face of ``NxDModelForCausalLM`` of optimum-neuron: one graph of each kind."""

    def __init__(self, folder: Path, *, slots: int, length: int, context: int) -> None:
        self.neuron_config = SimpleNamespace(
            batch_size=slots,
            max_batch_size=slots,
            sequence_length=length,
            max_context_length=context,
            continuous_batching=True,
            on_device_sampling=False,
            output_logits=False,
            torch_dtype=torch.float32,
        )
        self.llama = Llama(folder, slots, length)
        self.calls: list[str] = []

    def forward(  # noqa: PLR0917 - the library's own signature
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seq_ids: Tensor | None = None,
        sampling_params: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor:
        config = self.neuron_config
        assert seq_ids is not None
        assert sampling_params is not None
        assert sampling_params.shape == (len(seq_ids), 3)
        if input_ids.shape[-1] > 1 and not position_ids.min().item():
            self.calls.append("context")
            pad = config.max_context_length - input_ids.shape[1]
            tokens = torch.nn.functional.pad(input_ids, (0, pad), value=0)
            positions = torch.nn.functional.pad(position_ids, (0, pad), value=1)
            lines = [
                self.llama.prompt(tokens[[line]], positions[[line]], seq_ids[[line]])
                for line in range(len(seq_ids))
            ]
            return torch.cat(lines)
        self.calls.append("generation")
        assert len(seq_ids) == config.batch_size, "a smaller batch is filled up with foreign slots"
        return self.llama.token(input_ids, position_ids.long(), seq_ids, config.sequence_length)


class NxdiModel:
    """The face of ``NeuronBaseForCausalLM`` of NxD Inference: several graphs of each kind."""

    def __init__(
        self,
        folder: Path,
        *,
        slots: int,
        length: int,
        context: list[int],
        generation: list[int],
    ) -> None:
        self.neuron_config = SimpleNamespace(
            batch_size=slots,
            tkg_batch_size=slots,
            max_batch_size=slots,
            ctx_batch_size=1,
            seq_len=length,
            max_context_length=context[-1],
            is_continuous_batching=True,
            is_block_kv_layout=False,
            async_mode=False,
            on_device_sampling_config=None,
            enable_fused_speculation=False,
            is_medusa=False,
            speculation_length=0,
            context_encoding_buckets=context,
            token_generation_buckets=generation,
            torch_dtype=torch.float32,
        )
        self.llama = Llama(folder, slots, length)
        self.calls: list[tuple[str, int]] = []

    def forward(  # noqa: PLR0917 - the library's own signature
        self,
        input_ids: Tensor,
        seq_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: object = None,
        sampling_params: Tensor | None = None,
    ) -> SimpleNamespace:
        config = self.neuron_config
        assert seq_ids is not None
        assert attention_mask is not None
        assert position_ids is not None
        # A prompt, whatever its width: see ``NeuronBaseForCausalLM._is_prefill``.
        if position_ids.min().item() == 0:
            bucket = _first_fit(config.context_encoding_buckets, attention_mask.shape[1])
            self.calls.append(("context", bucket))
            pad = (0, bucket - input_ids.shape[1])
            tokens = torch.nn.functional.pad(input_ids, pad, value=0)
            positions = torch.nn.functional.pad(position_ids, pad, value=1)
            lines = [
                self.llama.prompt(tokens[[line]], positions[[line]], seq_ids[[line]])
                for line in range(len(seq_ids))
            ]
            return SimpleNamespace(logits=torch.cat(lines))
        logits = self.token_generation_model(
            input_ids, attention_mask, position_ids, seq_ids, sampling_params, None, None
        )
        return SimpleNamespace(logits=logits)

    def token_generation_model(  # noqa: PLR0917 - the library's own order
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        seq_ids: Tensor,
        sampling_params: Tensor | None,
        prev_hidden: None,
        adapter_ids: None,
    ) -> Tensor:
        """``ModelWrapper.forward`` of that graph."""
        config = self.neuron_config
        bucket = _first_fit(config.token_generation_buckets, attention_mask.shape[1])
        self.calls.append(("generation", bucket))
        assert len(seq_ids) == config.batch_size, "a smaller batch is filled up with foreign slots"
        # What the mask leaves out of the cache must be what lies before each position.
        assert (attention_mask.sum(1, keepdim=True) == position_ids).all()
        assert int(position_ids.max()) < bucket
        return self.llama.token(input_ids, position_ids.long(), seq_ids, bucket)


def _first_fit(buckets: list[int], width: int) -> int:
    for bucket in buckets:
        if width < bucket:
            return bucket
    assert width == buckets[-1], "the library refuses what is wider than its largest bucket"
    return width
