"""Reads the head of a GGUF file: its key-value pairs, and whether the file is whole.

Written here because the ``gguf`` package maps every string of a vocabulary to an array of its own,
which takes seconds, and because a faulty file must be named in one line before an engine sees it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from shards.engines.base import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# What engines say that take Hugging Face's folders, too.
NO_MODEL = "no config.json and no GGUF file"
_STRING, _ARRAY = 8, 9
# Value type: struct format.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# Tensor type: elements in a block, bytes of a block. From ggml-common.h; types that are not here
# are not checked for truncation.
_BLOCKS = {
    0: (1, 4),
    1: (1, 2),
    2: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    8: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    30: (1, 2),
}
# general.file_type, from llama.h (llama_ftype).
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is: ``offset`` counts bytes from the start of the file.

    ``shape`` has the rows first, as numpy counts; ``kind`` is ggml's number of the element type.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def gguf_file_of(path: Path, lacking: str = "no GGUF file") -> Path:
    """The GGUF file that is meant: the file itself, or the only one (or first part) in a folder.

    ``lacking`` is what an engine says of a folder that it cannot load. Raises ``ModelError``.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    whole = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(whole) == 1:
        return whole[0]
    found = f"{len(whole)} GGUF files; name one" if whole else lacking
    raise ModelError(f"model folder {path}: holds {found}")


def read_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs; arrays of strings are lists of ``str``, other arrays are lists too.

    Raises ``ModelError`` with one line if the file is missing, no GGUF file, or cut short.
    """
    return _read(path)[0]


def read_tensors(path: Path) -> list[TensorInfo]:
    """What tensors the file has. Raises ``ModelError`` as ``read_metadata`` does."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelError(f"model {path}: is a folder, not a GGUF file")
        if size == 0:
            raise ModelError(f"model file {path}: is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except FileNotFoundError:
        raise ModelError(f"model file {path}: does not exist") from None
    except OSError as error:
        raise ModelError(f"model file {path}: cannot be read: {error.strerror}") from error


def dtype_name(metadata: Mapping[str, Any]) -> str:
    """The element type of most weights, for example ``Q4_1``."""
    kind = metadata.get("general.file_type")
    return FILE_TYPES.get(kind, f"file_type_{kind}") if isinstance(kind, int) else "mixed"


class _Reader:
    """Walks through the head of one file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def read(self) -> tuple[dict[str, Any], list[TensorInfo]]:
        if self._data[:4] != MAGIC:
            raise ModelError(
                f"model file {self._path}: is no GGUF file (starts with {self._data[:4]!r})"
            )
        self._at = 4
        try:
            version = self._scalar("I")
            if version not in VERSIONS:
                raise ModelError(f"model file {self._path}: GGUF version {version} is unsupported")
            tensors, pairs = self._scalar("Q"), self._scalar("Q")
            metadata = dict(self._pair() for _ in range(pairs))
            infos = self._tensors(tensors, int(metadata.get("general.alignment", 32)))
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError):
            raise self._cut() from None
        return metadata, infos

    def _cut(self) -> ModelError:
        return ModelError(f"model file {self._path}: is damaged or cut short ({self._size} bytes)")

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _bytes(self) -> bytes:
        length = self._scalar("Q")
        start, self._at = self._at, self._at + length
        if self._at > self._size:
            raise self._cut()
        return self._data[start : self._at]

    def _pair(self) -> tuple[str, Any]:
        key = self._bytes().decode()
        return key, self._value(self._scalar("I"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._bytes().decode(errors="replace")
        if kind == _ARRAY:
            inner, length = self._scalar("I"), self._scalar("Q")
            if length > self._size:
                raise self._cut()
            return self._array(inner, length)
        if kind not in _SCALARS:
            raise self._cut()
        return self._scalar(_SCALARS[kind])

    def _array(self, inner: int, length: int) -> list[Any]:
        if inner == _STRING:
            return list(self._strings(length))
        if inner not in _SCALARS:
            return [self._value(inner) for _ in range(length)]
        kind = np.dtype("<" + _SCALARS[inner])
        if self._at + length * kind.itemsize > self._size:
            raise self._cut()
        values: list[Any] = np.frombuffer(self._data, kind, length, self._at).tolist()
        self._at += length * kind.itemsize
        return values

    def _strings(self, length: int) -> Iterator[str]:
        """A vocabulary has tens of thousands: this loop is written for speed."""
        data, unpack, at, size = self._data, struct.Struct("<Q").unpack_from, self._at, self._size
        for _ in range(length):
            end = at + 8 + unpack(data, at)[0]
            if end > size:
                raise self._cut()
            yield data[at + 8 : end].decode(errors="replace")
            at = end
        self._at = at

    def _tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        """All tensors. Raises if one would end behind the end of the file."""
        found, end = [], 0
        for _ in range(count):
            name = self._bytes().decode()
            shape = [self._scalar("Q") for _ in range(self._scalar("I"))]
            kind, offset = self._scalar("I"), self._scalar("Q")
            per_block, block_bytes = _BLOCKS.get(kind, (1, 0))
            end = max(end, offset + prod(shape) // per_block * block_bytes)
            found.append(TensorInfo(name, tuple(reversed(shape)), kind, offset))
        start = -(-self._at // alignment) * alignment
        if count and start + end > self._size:
            raise ModelError(
                f"model file {self._path}: is cut short"
                f" ({self._size} bytes of at least {start + end})"
            )
        return [replace(info, offset=start + info.offset) for info in found]
