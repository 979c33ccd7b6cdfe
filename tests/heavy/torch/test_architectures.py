"""Small random models of many architectures against the library's own ``generate``.

They differ in what attention must do: windows in some or all layers, capped scores, sinks,
normalised queries, experts, no rotary embeddings at all.
"""

from pathlib import Path

import pytest
import torch

from shards.engines.base import ModelError
from tests.heavy.torch.made import answer, assert_same, make, random_model, reference

ARCHITECTURES: dict[str, dict[str, object]] = {
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "opt": {},
    "phi3": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
}
# Which layers of some of them look back only so far.
WINDOWS = {"mistral": [16, 16, 16], "qwen2": [0, 16, 16], "gemma3_text": [16, 0, 16]}
PROMPTS = [[(7 * n + 13 * k) % 250 + 3 for k in range(14 + 9 * n)] for n in range(1, 5)]
COUNT = 24


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_answers_as_transformers_does(tmp_path: Path, name: str) -> None:
    model = random_model(tmp_path, name, **ARCHITECTURES[name])
    engine = make(tmp_path)
    windows = [shape.kind.window for shape in engine._model.shapes]
    assert windows == WINDOWS.get(name, windows)
    seen = answer(engine, PROMPTS, COUNT)
    engine.close()
    assert len({token for tokens in seen for token in tokens}) > 20
    for prompt, tokens in zip(PROMPTS, seen, strict=True):
        assert_same(tokens, *reference(model, prompt, COUNT))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4_text", "chunked_attention"),
        ("mamba", "does not let its attention be replaced"),
        ("bloom", "does not let its attention be replaced"),
    ],
)
def test_what_cannot_be_paged_is_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    random_model(tmp_path, name)
    with pytest.raises(ModelError, match=reason) as caught:
        make(tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_more_in_its_attention_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a layer changed the scores without telling: then what is computed differs."""
    from transformers.models.llama import modeling_llama

    random_model(tmp_path, "llama")
    plain = modeling_llama.eager_attention_forward

    def other(module: object, query: torch.Tensor, *arguments: object, **given: object) -> object:
        return plain(module, query * 3.0, *arguments, **given)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    with pytest.raises(ModelError, match="does more than the torch engine can page"):
        make(tmp_path)


def test_fused_layers_compute_the_same(tmp_path: Path) -> None:
    """Qwen2 has biases in some of the layers that are put together."""
    random_model(tmp_path, "qwen2")
    fused, plain = (make(tmp_path, extra={"fuse": how, "pack": "off"}) for how in ("on", "off"))
    names = [type(module).__name__ for module in fused._model._model.modules()]
    assert names.count("Lead") == 6
    assert answer(fused, PROMPTS, COUNT) == answer(plain, PROMPTS, COUNT)
    fused.close()
    plain.close()
