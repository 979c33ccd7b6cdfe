"""Norms in one kernel: the same numbers, and only where they are the same."""

from pathlib import Path

import pytest
import torch

from shards.engines.torch_norms import Norm, fuse_norms
from tests.heavy.torch.made import random_model


@pytest.mark.parametrize(
    ("model_type", "replaced"), [("llama", 7), ("qwen3", 13), ("gemma3_text", 0)]
)
def test_norms_are_replaced_where_they_compute_the_same(
    tmp_path: Path, model_type: str, replaced: int
) -> None:
    """Two a layer and the last one, and two more of Qwen's heads; Gemma's add one to the weight."""
    model = random_model(tmp_path, model_type)
    for parameter in model.parameters():
        parameter.data += 0.01  # weights of norms are all ones at first
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        assert fuse_norms(model) == replaced
        seen = model(tokens).logits
    assert sum(isinstance(module, Norm) for module in model.modules()) == replaced
    assert torch.allclose(seen, expected, rtol=1e-4, atol=1e-4)


def test_weights_stay_the_models_own(tmp_path: Path) -> None:
    """What is counted, moved or replaced later is found where it was."""
    model = random_model(tmp_path, "llama")
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    fuse_norms(model)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
