"""Weights by name: parts of safetensors and GGUF files, and files that are faulty."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from shards.engines.base import ModelError
from shards.hf_folder import read_config
from shards.weights import open_weights
from tests.heavy.models import save_tensors

RANDOM = np.random.default_rng(1)
CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 6}
MATRIX = RANDOM.standard_normal((6, 8)).astype(np.float32)
VECTOR = RANDOM.standard_normal(8).astype(np.float32)
PART = (slice(2, 5), slice(None, 3))


def folder_with(path: Path, files: dict[str, dict[str, np.ndarray]], dtype: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in files.items():
        save_tensors(path / name, tensors, dtype=dtype)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return folder_with(tmp_path / "m", {"model.safetensors": {"a": MATRIX, "b": VECTOR}}, "float32")


def test_a_part_of_a_weight_is_read(whole: Path) -> None:
    weights = open_weights(whole)
    assert weights.config == CONFIG
    assert dict(weights.shapes) == {"a": (6, 8), "b": (8,)}
    assert (weights.read("a") == MATRIX).all()
    part = weights.read("a", PART)
    assert (part == MATRIX[PART]).all()
    assert part.flags.c_contiguous
    assert (weights.read("b", (slice(4, None),)) == VECTOR[4:]).all()
    assert weights.read("a", PART, np.dtype(np.float16)).dtype == np.float16


def test_what_is_read_can_be_written_to(whole: Path) -> None:
    weights = open_weights(whole)
    weights.read("a")[:] = 0
    assert (weights.read("a") == MATRIX).all()


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"model.safetensors": {"a": MATRIX}}, "bfloat16")
    found = open_weights(folder).read("a", PART)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, MATRIX[PART], rtol=2**-8)
    assert not (found.view(np.uint32) & 0xFFFF).any()


def test_parts_are_found_by_the_index(tmp_path: Path) -> None:
    files = {"one.safetensors": {"a": MATRIX}, "two.safetensors": {"b": VECTOR}}
    folder = folder_with(tmp_path / "m", files, "float32")
    with pytest.raises(ModelError, match="2 safetensors files, but no"):
        open_weights(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    weights = open_weights(folder)
    assert (weights.read("a") == MATRIX).all()
    assert (weights.read("b") == VECTOR).all()
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(ModelError, match="names of files"):
        open_weights(folder)


def test_a_missing_weight_is_named(whole: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weight c"):
        open_weights(whole).read("c")


def _header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[bytes], bytes]:
    """Changes the header of a safetensors file."""

    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return changed


_NESTED = b'{"a":' * 100_000
_DEEP = len(_NESTED).to_bytes(8, "little") + _NESTED
FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _data: b"", "is empty"),
    "text": (lambda _data: b"This is no model, but a text.", "is no safetensors file"),
    "cut in the head": (lambda data: data[:20], "is cut short"),
    "cut in the data": (lambda data: data[:-4], "ends behind its end"),
    "no JSON": (lambda data: data[:8] + b"#" + data[9:], "damaged safetensors header"),
    "too deep": (lambda _data: _DEEP, "damaged safetensors header"),
    "a list": (lambda _data: b"\x02" + bytes(7) + b"[]", "damaged safetensors header"),
    "no shape": (_header(lambda head: head["a"].pop("shape")), "damaged safetensors header"),
    "wrong shape": (_header(lambda head: head["a"].update(shape=[6, 9])), "damaged safetensors"),
}


@pytest.mark.parametrize("case", list(FAULTS))
def test_a_faulty_file_is_named_in_one_line(whole: Path, case: str) -> None:
    file = whole / "model.safetensors"
    spoil, reason = FAULTS[case]
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ModelError, match=reason) as caught:
        open_weights(whole)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"{", b"[]", _NESTED, b"\xff"])
def test_a_faulty_config_is_named_in_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config.json: (is not JSON|holds no JSON)") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_type_that_nobody_reads_is_named_when_it_is_asked_for(whole: Path) -> None:
    file = whole / "model.safetensors"
    file.write_bytes(_header(lambda h: h["a"].update(dtype="F8_E4M3"))(file.read_bytes()))
    weights = open_weights(whole)
    assert (weights.read("b") == VECTOR).all()
    with pytest.raises(ModelError, match="weight a has the type F8_E4M3; what can be read is F32"):
        weights.read("a")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json and no GGUF file"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no safetensors"):
        open_weights(tmp_path)


# GGUF ------------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
WIDTH = HEADS * HEAD_DIM


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to queries and keys: halves become neighbours."""
    out = np.empty_like(rows)
    dim = len(rows) // heads
    for head in range(heads):
        for pair in range(dim // 2):
            for half in range(2):
                out[head * dim + 2 * pair + half] = rows[head * dim + half * (dim // 2) + pair]
    return out


QUERIES = RANDOM.standard_normal((WIDTH, WIDTH)).astype(np.float32)
KEYS = RANDOM.standard_normal((KV_HEADS * HEAD_DIM, WIDTH)).astype(np.float32)
BIAS = RANDOM.standard_normal(WIDTH).astype(np.float32)
EMBEDDING = RANDOM.standard_normal((6, WIDTH)).astype(np.float32)


def write_gguf(path: Path, arch: str, **more: float) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_context_length(128)
    writer.add_rope_freq_base(5000.0)
    writer.add_token_list([b"a", b"b", b"c", b"d", b"e", b"f"])
    writer.add_eos_token_id(5)
    for key, value in more.items():
        writer.add_uint32(f"{arch}.{key}", int(value))
    mixed = arch == "llama"
    writer.add_tensor("blk.0.attn_q.weight", permuted(QUERIES, HEADS) if mixed else QUERIES)
    writer.add_tensor("blk.0.attn_q.bias", permuted(BIAS, HEADS) if mixed else BIAS)
    writer.add_tensor("blk.0.attn_k.weight", permuted(KEYS, KV_HEADS) if mixed else KEYS)
    kind = gguf.GGMLQuantizationType.Q8_0
    quantised = gguf.quants.quantize(EMBEDDING, kind)
    writer.add_tensor("token_embd.weight", quantised, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", VECTOR)
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_gguf_file_looks_like_a_folder(tmp_path: Path, arch: str) -> None:
    weights = open_weights(write_gguf(tmp_path / "m.gguf", arch))
    layer = "model.layers.0.self_attn"
    assert (weights.read(f"{layer}.q_proj.weight") == QUERIES).all()
    assert (weights.read(f"{layer}.q_proj.bias") == BIAS).all()
    assert (weights.read(f"{layer}.k_proj.weight") == KEYS).all()
    part = (slice(5, 21), slice(3, 17))
    assert (weights.read(f"{layer}.q_proj.weight", part) == QUERIES[part]).all()
    assert (weights.read(f"{layer}.q_proj.bias", part[:1]) == BIAS[part[0]]).all()
    embedding = weights.read("model.embed_tokens.weight", (slice(1, 4),))
    np.testing.assert_allclose(embedding, EMBEDDING[1:4], atol=0.02)
    assert weights.shapes["model.embed_tokens.weight"] == (6, WIDTH)
    config = weights.config
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    assert config["architectures"] == [names[arch]]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["head_dim"], config["vocab_size"], config["rope_theta"]) == (8, 6, 5000.0)
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == [5]
    assert config["rope_divisors"] == [1, 1, 2, 8]


def test_the_only_gguf_file_of_a_folder_is_taken(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", "llama")
    assert (open_weights(tmp_path).read("model.norm.weight") == VECTOR).all()
    write_gguf(tmp_path / "two.gguf", "llama")
    with pytest.raises(ModelError, match="holds 2 GGUF files; name one"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("arch", "more", "reason"),
    [
        ("mamba", {}, "of the architecture mamba; what can be read is llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "of the architecture llama with experts"),
    ],
)
def test_another_architecture_is_named(
    tmp_path: Path, arch: str, more: dict[str, float], reason: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch, **more)
    with pytest.raises(ModelError, match=reason) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)
