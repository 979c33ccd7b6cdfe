"""Every member of the Llama family against ``transformers.generate``; and what is outside of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.engines import jax_config, load
from shards.engines.base import EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.jax_buckets import MIXED, choose, common_pages, pack
from shards.kv import TRASH
from tests.engines.contract import admit, decode
from tests.heavy import reference
from tests.heavy.family import MEMBERS, member_folder
from tests.heavy.jax.test_attention import BASE, CASES, layout_of
from tests.heavy.models import tiny_llama_folder


@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_member_of_the_family_is_as_the_reference(tmp_path: Path, name: str) -> None:
    entry = next(entry for entry in reference.read("family") if entry["name"] == name)
    options = EngineOptions(
        member_folder(name, tmp_path / name),
        name,
        kv_tokens=256,
        sequences_max=1,
        step_tokens_max=32,
        device="cpu",
        dtype="float32",
    )
    engine = load("jax", options, lambda _fraction: None)
    try:
        made = admit(1, entry["prompt"], SamplingParams(logprobs=True))
        engine.step(Plan(admits=[made], work=[(1, 29)]))
        first = engine.step(Plan(work=[(1, len(entry["prompt"]) - 29)]))
        found = first.tokens + decode(engine, 1, len(entry["tokens"]) - 1)
    finally:
        engine.close()
    assert first.logprobs[1].logprob == pytest.approx(entry["logprob"], abs=1e-3)
    assert reference.agreed(found, entry) > len(found) // 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "the model is a GPT2LMHeadModel; this engine has"),
        ({"architectures": None}, "the model is a unknown"),
        ({"hidden_act": "gelu"}, "the activation gelu is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "of the kind yarn"),
        ({"partial_rotary_factor": 0.5}, "rotated in part"),
        ({"layer_types": ["full_attention", "chunked"]}, "the layer type chunked"),
    ],
)
def test_what_is_outside_the_family_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        jax_config.read({**BASE, **change})
    assert "\n" not in str(caught.value)


def test_what_is_missing_in_config_json_is_named() -> None:
    config = {key: value for key, value in BASE.items() if key != "rms_norm_eps"}
    with pytest.raises(ModelError, match=r"config\.json has no rms_norm_eps"):
        jax_config.read(config)


def test_a_model_is_cut_by_whole_heads() -> None:
    config = jax_config.read(BASE)
    assert (config.local(3).heads, config.local(3).kv_heads, config.local(3).inner) == (2, 1, 64)
    with pytest.raises(ModelError, match=r"3 KV heads cannot be spread over 2 ranks.* 1, 3$"):
        config.local(2)


def test_rotations_are_stretched_as_llama_3_says() -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    plain = jax_config.read({**BASE, "head_dim": 128, "rope_theta": 500000.0}).frequencies
    found = jax_config.read({**BASE, "head_dim": 128, "rope_parameters": rope}).frequencies
    kinds = set()
    for before, after in zip(plain, found, strict=True):
        length = 2 * math.pi / before
        if length < 8192 / 4:
            kinds.add("fast")
            assert after == pytest.approx(before)
        elif length > 8192 / 1:
            kinds.add("slow")
            assert after == pytest.approx(before / 8, rel=1e-6)
        else:
            kinds.add("between")
            assert before / 8 < after < before
    assert kinds == {"fast", "slow", "between"}


def test_a_faulty_model_is_named_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    config = json.loads((tiny_llama_folder() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="holds no safetensors") as caught:
        load("jax", EngineOptions(folder, "m", device="cpu"), lambda _fraction: None)
    assert str(folder) in str(caught.value)


# Shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_a_step_keeps_its_meaning_when_it_is_packed(case: str) -> None:
    layout = layout_of(*CASES[case], np.random.default_rng(3))
    bucket = choose(16, 256, pages=24).fit(layout)
    vector = pack(layout, bucket)
    at = {name: vector[span].reshape(shape) for name, span, shape in bucket.spans()}
    rows, blocks, _, sequences = at["counts"]
    starts = at["starts"]
    assert sequences == len(layout.lengths)
    # Rows first, and each token drawn from is the one that it was.
    assert (np.diff(starts)[:rows] == 1).all()
    assert (np.diff(starts)[rows:sequences] > 1).all()
    drawn = [(at["cells"][d], at["tokens"][d]) for d in at["draws"][: len(layout.draws)]]
    assert drawn == [(layout.cells[d], layout.tokens[d]) for d in layout.draws]
    # The blocks are all tokens behind the rows, in order, each in its sequence.
    covered = [range(start, start + count) for _, start, count in at["blocks"][:blocks]]
    assert [token for part in covered for token in part] == list(range(rows, starts[sequences]))
    for sequence, start, count in at["blocks"][:blocks]:
        assert starts[sequence] <= start < start + count <= starts[sequence + 1]
    padding = slice(len(layout.tokens), None)
    assert (at["cells"][padding] // 16 == TRASH).all()
    assert (at["lengths"][sequences:] == 1).all()


def test_pages_in_common_are_counted() -> None:
    table = np.array([[4, 5, 6, 0], [4, 5, 7, 8], [4, 5, 9, 0]], np.int32)
    assert common_pages(table) == 2
    assert common_pages(table[:1]) == 0
    assert common_pages(np.array([[4, 0], [5, 0]], np.int32)) == 0
    assert common_pages(np.array([[4, 5], [4, 5]], np.int32)) == 2


def test_every_step_within_the_limits_fits_a_bucket() -> None:
    buckets = choose(12, 100, pages=8, least=4)
    assert [bucket.tokens for bucket in buckets.decodes] == [4, 8, 12]
    assert [bucket.tokens for bucket in buckets.mixed] == [32, 64, 100]
    assert set(MIXED) > {32, 64}
    for sequences in range(1, 13):
        layout = layout_of([(3, 1)] * (sequences - 1) + [(0, 100 - 12)], 0, _random())
        assert buckets.fit(layout).mixed
        layout = layout_of([(3, 1)] * sequences, 0, _random())
        assert buckets.fit(layout).sequences >= sequences


def test_less_than_half_of_a_mixed_step_is_padding() -> None:
    """From 33 tokens up to what a CPU computes in a step."""
    buckets = choose(64, 256, pages=8)
    for tokens in range(33, 257):
        layout = layout_of([(3, 1), (0, tokens - 1)], 0, _random())
        assert buckets.fit(layout).tokens < 2 * tokens


def _random() -> np.random.Generator:
    return np.random.default_rng(0)
