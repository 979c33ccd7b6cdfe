"""Models of the ``transformers`` library made ready for paged attention.

The modelling code stays the library's own. At load one short prompt is computed twice, once with
the library's plain attention and once with ours, which shows what each layer wants (heads, scale,
window, caps), and that nothing else than we do happens inside of attention.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from shards.engines.base import ModelError
from shards.engines.torch_attention import (
    NAME,
    Given,
    PagedLayer,
    Shape,
    Step,
    attend,
    attend_dense,
)
from shards.engines.torch_views import Kind, causal_mask

if TYPE_CHECKING:
    from shards.engines.torch_kernel import PagedKernel
    from shards.engines.torch_native import Native

# Kinds of layers, by the names in a configuration's ``layer_types``.
_FULL, _SLIDING = "full_attention", "sliding_attention"
# What a model may say to its attention function that we do not know how to do.
_UNKNOWN = ("position_bias", "block_indices", "indices", "sinks")
# Rotary embeddings whose angles depend on the longest sequence of a batch; neighbours would change
# an answer, so sequences stay as short as the model was first trained with.
_BATCH_ROPES = ("dynamic", "longrope")
_PROBE_TOKENS = 12
# The probe's logits must point the same way; rounding alone keeps 16-bit types above 0.999.
AGREEMENT_MIN = 0.99

transformers.AttentionInterface.register(NAME, attend)


def check_architecture(config: Any, where: str) -> None:
    """Raises ``ModelError``, by name, for models that paged attention cannot serve."""
    kind = config.model_type
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.get_text_config()
    what = f"model {where}: architecture {kind}"
    if model is None or config.is_encoder_decoder:
        raise ModelError(f"{what} is not a decoder-only language model that transformers knows")
    if isinstance(model, tuple):
        model = model[0]
    if not model._supports_attention_backend:  # noqa: SLF001 - the flag has no public name
        raise ModelError(f"{what} does not let its attention be replaced, so it cannot be paged")
    types = set(getattr(text, "layer_types", None) or ())
    others = sorted(types - {_FULL, _SLIDING})
    if others or getattr(text, "attention_chunk_size", None):
        found = ", ".join(others or ["chunked_attention"])
        raise ModelError(f"{what} has layers of a kind that the torch engine cannot page: {found}")


def length_trained(config: Any) -> int:
    """Tokens that a sequence may have."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or {}
    nested = [one for one in ropes.values() if isinstance(one, Mapping)] or [ropes]
    longest = int(text.max_position_embeddings)
    for rope in nested:
        if rope.get("rope_type") in _BATCH_ROPES:
            first = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            longest = min(longest, int(first or longest))
    return longest


class Probe:
    """Stands in for the layers once: records what each wants, and computes it densely."""

    def __init__(self, config: Any, where: str) -> None:
        text = config.get_text_config()
        self._types = getattr(text, "layer_types", None)
        self._window = int(getattr(text, "sliding_window", None) or 0)
        if getattr(text, "use_sliding_window", True) is False:
            self._window = 0
        self._where = where
        self.found: list[tuple[Any, Shape]] = []

    def attend(self, module: Any, query: Any, key: Any, value: Any, given: Given) -> Any:
        """See ``torch_attention.attend``."""
        lacking = [name for name in _UNKNOWN if given.get(name) is not None]
        if given.get("is_causal") is False or not getattr(module, "is_causal", True):
            lacking.append("attention in both directions")
        if lacking:
            raise ModelError(f"model {self._where}: uses {lacking[0]}, which cannot be paged")
        if any(module is other for other, _ in self.found):
            raise ModelError(f"model {self._where}: a layer attends twice, which cannot be paged")
        scale = given.get("scaling")
        shape = Shape(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scale=query.shape[3] ** -0.5 if scale is None else float(scale),
            kind=Kind(self._window_of(len(self.found), given), float(given.get("softcap") or 0.0)),
        )
        self.found.append((module, shape))
        mask = causal_mask(0, 0, query.shape[2], query.shape[2], shape.kind, query)
        out = attend_dense(query[0], key[0], value[0], mask, shape, given.get("s_aux"))
        return out.transpose(0, 1)[None]

    def _window_of(self, layer: int, given: Given) -> int:
        if "sliding_window" in given:
            return int(given["sliding_window"] or 0)
        if self._types is not None and layer < len(self._types):
            return self._window if self._types[layer] == _SLIDING else 0
        if self._window:
            raise ModelError(
                f"model {self._where}: has a sliding window, but does not say in which layers"
            )
        return 0


class PagedModel:
    """A model whose layers attend over pages; made with the weights in place."""

    def __init__(
        self,
        model: Any,
        where: str,
        device: torch.device,
        dtype: torch.dtype,
        kernel: "PagedKernel | None" = None,
        native: "Native | None" = None,
    ) -> None:
        self.step = Step(kernel)
        self._native = native
        self._model = model
        self._device = device
        self._dtype = dtype
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        found = self._probe(where)
        self.shapes = [shape for _, shape in found]
        self._modules = [module for module, _ in found]
        self.kinds = tuple(dict.fromkeys(shape.kind for shape in self.shapes))
        self.layers: list[PagedLayer] = []

    def _probe(self, where: str) -> list[tuple[Any, Shape]]:
        model = self._model
        tokens = torch.arange(1, 1 + _PROBE_TOKENS, device=self._device) * 7 % self.vocab_size
        positions = torch.arange(_PROBE_TOKENS, device=self._device)
        last = positions[-1:]
        model.set_attn_implementation("eager")
        expected = self.forward(tokens, positions, last)
        model.set_attn_implementation(NAME)
        probe = Probe(model.config, where)
        for module in model.modules():
            module.roundhouse = probe
        seen = self.forward(tokens, positions, last)
        for module in model.modules():
            del module.roundhouse
        agreement = nn.functional.cosine_similarity(seen.float(), expected.float()).item()
        layers = model.config.get_text_config().num_hidden_layers
        if len(probe.found) != layers or not agreement > AGREEMENT_MIN:
            raise ModelError(
                f"model {where}: its attention does more than the torch engine can page"
                f" ({len(probe.found)} of {layers} layers seen, agreement {agreement:.3f})"
            )
        return probe.found

    def blocks(self) -> list[Any]:
        """The decoder layers: modules in a list, each with one that attends. Empty if unclear."""
        attending = {id(module) for module in self._modules}
        listed = [module for module in self._model.modules() if isinstance(module, nn.ModuleList)]
        found = [
            child
            for child in (child for several in listed for child in several)
            if sum(id(module) in attending for module in child.modules()) == 1
        ]
        inner = {id(module) for child in found for module in child.modules() if module is not child}
        found = [child for child in found if id(child) not in inner]
        return found if len(found) == len(self._modules) else []

    def bytes_per_token(self) -> int:
        """KV cache of one token over all layers of this rank."""
        return sum(shape.bytes_per_token(self._dtype) for shape in self.shapes)

    def make_cache(self, page_count: int, page_tokens: int) -> None:
        """Makes the KV cache; only then can steps be computed."""
        if self._native is not None:
            from shards.engines.torch_native_trial import attends

            if attends(self._native, self.shapes, page_tokens):
                self.step.native = self._native
        for module, shape in zip(self._modules, self.shapes, strict=True):
            layer = PagedLayer(shape, page_count, page_tokens, self._dtype, self._device, self.step)
            module.roundhouse = layer
            self.layers.append(layer)

    def clear(self, pages: list[int] | slice) -> None:
        """Fills pages with zeros, in all layers."""
        for layer in self.layers:
            layer.keys[pages] = 0.0
            layer.values[pages] = 0.0

    def forward(self, tokens: Any, positions: Any, rows: Any) -> Any:
        """Logits [rows, vocabulary] behind some tokens of a flat batch; all arguments are int64."""
        more = {"logits_to_keep": rows} if self._keeps else {}
        # As a column of a matrix, positions would tell compiled layers how wide that is.
        positions = positions.contiguous()
        with torch.inference_mode():
            logits = self._model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False, **more
            ).logits[0]
        return logits if self._keeps else logits[rows]
