"""Weights by name from a model's files, read lazily: a rank reads only its own rows and columns.

Two kinds of model are known, and look the same from outside: a folder as the Hugging Face
libraries write it (``config.json`` and safetensors, whole or in parts), and a GGUF file of the
Llama family, whose tensors get the names, the shapes and the order of rows that the folder would
have. Files are mapped into memory, so opening a model reads no weights.

Formats: https://huggingface.co/docs/safetensors (a length, a JSON header, the data) and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs neither torch nor JAX.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import ModelError
from shards.gguf_file import NO_MODEL, TensorInfo, gguf_file_of, read_metadata, read_tensors
from shards.hf_folder import is_hf_folder, read_config, read_json

Array = NDArray[Any]
Index = tuple[slice, ...]
"""One slice with step 1 for each of the first dimensions; those that are missing are whole."""

_FLOAT32 = np.dtype(np.float32)
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Longer headers are taken for damage, as the format's own library does.
_HEADER_MAX = 100_000_000
# numpy has no bfloat16: its bits are read as integers, see ``_convert``.
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


class Weights(ABC):
    """The configuration and the weights of one model.

    ``config`` is what ``config.json`` holds. ``shapes`` has the shape of each weight by its name.
    """

    def __init__(self, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config = config
        self.shapes = shapes

    @abstractmethod
    def read(self, name: str, index: Index = (), dtype: np.dtype[Any] = _FLOAT32) -> Array:
        """That part of a weight, as a new array of that type. A type named "bfloat16" will do.

        Raises ``ModelError`` if the model has no such weight, or has it in a type nobody can read.
        """


def open_weights(path: Path) -> Weights:
    """The weights of a folder or a GGUF file. Raises ``ModelError`` naming the file and reason."""
    if is_hf_folder(path):
        return _SafetensorsWeights(path)
    return _GgufWeights(gguf_file_of(path, NO_MODEL))


def _map(path: Path) -> Array:
    """The bytes of a file."""
    try:
        return np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise ModelError(f"model file {path}: does not exist") from None
    except ValueError:
        raise ModelError(f"model file {path}: is empty") from None
    except OSError as error:
        raise ModelError(f"model file {path}: cannot be read: {error.strerror}") from error


def _convert(stored: Array, dtype: np.dtype[Any]) -> Array:
    """A new array of that type; 16-bit integers are the bits of bfloat16."""
    if stored.dtype != np.uint16:
        return np.array(stored, dtype, order="C")
    if dtype.name == "bfloat16":
        return np.array(stored, order="C").view(dtype)
    bits = np.left_shift(stored, 16, dtype=np.uint32, order="C")
    return bits.view(np.float32).astype(dtype, copy=False)


# Safetensors -----------------------------------------------------------------------------------


class _SafetensorsWeights(Weights):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, Array | str] = {}
        for file in _safetensors_files(folder):
            self._arrays |= _safetensors(file)
        shapes = {n: a.shape for n, a in self._arrays.items() if not isinstance(a, str)}
        super().__init__(read_config(folder), shapes)

    def read(self, name: str, index: Index = (), dtype: np.dtype[Any] = _FLOAT32) -> Array:
        found = self._arrays.get(name)
        if found is None:
            raise ModelError(f"model folder {self._folder}: has no weight {name}")
        if isinstance(found, str):
            raise ModelError(
                f"model folder {self._folder}: weight {name} has the type {found};"
                f" what can be read is {', '.join(_DTYPES)}"
            )
        return _convert(found[index], dtype)


def _safetensors_files(folder: Path) -> list[Path]:
    """The file of the usual name, or those that the index names, or the only one."""
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    index = folder / _INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        found = f"{len(files)} safetensors files, but no {_INDEX}" if files else "no safetensors"
        raise ModelError(f"model folder {folder}: holds {found}")
    parts = read_json(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set()
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ModelError(f"model file {index}: has no weight_map with the names of files")
    return [folder / name for name in sorted(names)]


def _safetensors(path: Path) -> dict[str, Array | str]:
    """The weights of one file, mapped; in place of one that cannot be read, its type."""
    data = _map(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 0 < length <= min(_HEADER_MAX, len(data) - 8):
        raise ModelError(f"model file {path}: is no safetensors file, or is cut short")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        body = data[8 + length :]
        return {name: _tensor(path, name, about, body) for name, about in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(f"model file {path}: has a damaged safetensors header") from None


def _tensor(path: Path, name: str, about: dict[str, Any], body: Array) -> Array | str:
    start, end = about["data_offsets"]
    shape = tuple(int(length) for length in about["shape"])
    if not 0 <= start <= end <= len(body):
        raise ModelError(f"model file {path}: is cut short: weight {name} ends behind its end")
    code = _DTYPES.get(about["dtype"])
    return str(about["dtype"]) if code is None else body[start:end].view(code).reshape(shape)


# GGUF ------------------------------------------------------------------------------------------

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# llama.cpp's converter stores the rows of q and k of these for rotation of neighbouring pairs.
_PERMUTED = ("llama",)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_DIVISORS = "rope_freqs.weight"


class _GgufWeights(Weights):
    def __init__(self, path: Path) -> None:
        self._path = path
        metadata = read_metadata(path)
        self._tensors: dict[str, tuple[Array, TensorInfo]] = {}
        for part in _parts(path):
            data = _map(part)
            for info in read_tensors(part):
                self._tensors[_name(info.name)] = data, info
        config = _config(path, metadata, untied="lm_head.weight" in self._tensors)
        self._heads: dict[str, int] = {}
        if metadata["general.architecture"] in _PERMUTED:
            self._heads["self_attn.q_proj"] = int(config["num_attention_heads"])
            self._heads["self_attn.k_proj"] = int(config["num_key_value_heads"])
        if _ROPE_DIVISORS in self._tensors:
            config["rope_divisors"] = self.read(_ROPE_DIVISORS).tolist()
        super().__init__(config, {name: info.shape for name, (_, info) in self._tensors.items()})

    def read(self, name: str, index: Index = (), dtype: np.dtype[Any] = _FLOAT32) -> Array:
        if name not in self._tensors:
            raise ModelError(f"model file {self._path}: has no weight {name}")
        info = self._tensors[name][1]
        heads = next((n for part, n in self._heads.items() if part in name), 0)
        order = _unmixed(info.shape[0], heads) if heads else np.arange(info.shape[0])
        chosen = order[index[0] if index else slice(None)]
        values = self._dequantize(name, chosen)[(slice(None), *index[1:])]
        return np.array(values, dtype, order="C")

    def _dequantize(self, name: str, chosen: Array) -> Array:
        """Those rows, or those entries of a vector, in float32."""
        data, info = self._tensors[name]
        quants, block, block_bytes = _quantization(self._path, info)
        size = prod(info.shape) // block * block_bytes
        stored = data[info.offset : info.offset + size].reshape(*info.shape[:-1], -1)
        values: Array
        if len(info.shape) == 1:
            values = quants.dequantize(stored, info.kind)[chosen]
        else:
            values = quants.dequantize(stored[chosen], info.kind)
        return values


def _unmixed(rows: int, heads: int) -> Array:
    """For each row in the order of the Hugging Face libraries, which one it is in the file.

    A head's rows are halves there: rows i and i + half are rotated together. llama.cpp keeps such
    pairs as neighbours (``LlamaModel.permute`` in its ``convert_hf_to_gguf.py``).
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _parts(path: Path) -> list[Path]:
    """All files of a model that is cut into parts named ``...-00001-of-00004.gguf``."""
    cut = re.fullmatch(r"(.*)-00001-of-(\d{5})", path.stem)
    if cut is None:
        return [path]
    count = int(cut[2])
    return [path.with_name(f"{cut[1]}-{n:05}-of-{cut[2]}.gguf") for n in range(1, count + 1)]


def _name(name: str) -> str:
    """The name that the Hugging Face libraries give to a tensor of a GGUF file."""
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _IN_LAYER:
        return _OUTSIDE.get(name, name)
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"


def _quantization(path: Path, info: TensorInfo) -> tuple[Any, int, int]:
    """The package's module, and elements and bytes of a block of this kind."""
    try:
        from gguf import constants, quants
    except ModuleNotFoundError as missing:
        raise ModelError(
            f"model file {path}: reading it needs the package gguf; try: pip install gguf"
        ) from missing
    try:
        kind = constants.GGMLQuantizationType(info.kind)
        quants.dequantize(np.zeros((1, constants.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise ModelError(
            f"model file {path}: weight {info.name} has the type {info.kind},"
            " which the package gguf cannot read"
        ) from None
    return quants, *constants.GGML_QUANT_SIZES[kind]


def _config(path: Path, metadata: Mapping[str, Any], *, untied: bool) -> dict[str, Any]:
    """The configuration as ``config.json`` would have it."""
    arch = str(metadata.get("general.architecture"))
    if arch not in _ARCHITECTURES or metadata.get(f"{arch}.expert_count"):
        kind = f"{arch} with experts" if arch in _ARCHITECTURES else arch
        raise ModelError(
            f"model file {path}: is of the architecture {kind};"
            f" what can be read is {', '.join(_ARCHITECTURES)}"
        )
    try:
        return _config_of(arch, metadata, untied=untied)
    except KeyError as missing:
        raise ModelError(f"model file {path}: has no {missing.args[0]}") from None


def _config_of(arch: str, metadata: Mapping[str, Any], *, untied: bool) -> dict[str, Any]:
    heads = metadata[f"{arch}.attention.head_count"]
    width = metadata[f"{arch}.embedding_length"]
    config = {
        "architectures": [_ARCHITECTURES[arch]],
        "model_type": arch,
        # What quantised numbers become unless somebody wants more.
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": metadata[f"{arch}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{arch}.attention.key_length", width // heads),
        "rms_norm_eps": metadata[f"{arch}.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get(f"{arch}.rope.freq_base", 10000.0),
        "max_position_embeddings": metadata[f"{arch}.context_length"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": not untied,
        "eos_token_id": _ends(metadata),
    }
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        factor = metadata.get(f"{arch}.rope.scaling.factor", 1.0)
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    return config


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer or a turn."""
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    return sorted({int(metadata[key]) for key in keys if key in metadata})
