"""Tensors of the Open Inference Protocol, as Python values and back.

Elements travel as typed lists (``contents``) or, which Triton's clients prefer, as raw bytes beside
the tensors: little-endian numbers, and texts with their length before them as four bytes.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from router.errors import Fault, RequestError
from router.kserve.v1 import inference_pb2 as pb

NUMBERS = {
    "BOOL": ("?", "bool_contents"),
    "UINT8": ("u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "INT8": ("i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "FP16": ("<f2", ""),  # raw only
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
}
"""numpy's name of each datatype, and the field of ``InferTensorContents`` that has it."""

ELEMENTS_MAX = 65_536
"""Elements of one input: prompts, stop strings and numbers, not activations."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input: its elements in row-major order. BYTES are text."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]

    def row(self, index: int, rows: int) -> Sequence[Any]:
        """The elements for one of several prompts: all, unless there is a row for each."""
        if rows == 1 or not self.shape or self.shape[0] != rows:
            return self.values
        size = len(self.values) // rows
        return self.values[index * size : (index + 1) * size]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to send."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def inputs_of(request: pb.ModelInferRequest) -> Mapping[str, Tensor]:
    """Returns the inputs by name. Raises RequestError, VALIDATION or UNSUPPORTED."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        text = f"there are {len(request.inputs)} inputs, but {len(raw)} raw_input_contents"
        raise _invalid(text, "raw_input_contents")
    found: dict[str, Tensor] = {}
    for number, tensor in enumerate(request.inputs):
        name = tensor.name[:100]
        if name in found:
            raise _invalid(f"the input `{name}` is given twice", name)
        if any(key.startswith("shared_memory") for key in tensor.parameters):
            text = f"the input `{name}` is in shared memory, which is not supported: send it"
            raise RequestError(Fault.UNSUPPORTED, text, name)
        found[name] = _tensor_of(tensor, raw[number] if raw else None)
    return found


def _tensor_of(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, shape = tensor.name[:100], tuple(tensor.shape)
    if any(size < 0 for size in shape):
        raise _invalid(f"the shape of `{name}` has a negative size", name)
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise _invalid(f"`{name}` has {count} elements; {ELEMENTS_MAX} are the most", name)
    values: Sequence[Any]
    if tensor.datatype == "BYTES":
        data = tensor.contents.bytes_contents if raw is None else _split(raw, name)
        values = [_text(one, name) for one in data]
    elif tensor.datatype not in NUMBERS:
        kind = tensor.datatype[:32]
        raise _invalid(f"`{name}` has the datatype {kind!r}, which is not known here", name)
    elif raw is None:
        _, field = NUMBERS[tensor.datatype]
        values = list(getattr(tensor.contents, field)) if field else []
    else:
        values = _numbers(raw, NUMBERS[tensor.datatype][0], name)
    if len(values) != count:
        text = f"`{name}` has the shape {list(shape)}, but {len(values)} elements"
        raise _invalid(text, name)
    return Tensor(name, tensor.datatype, shape, values)


def _numbers(raw: bytes, kind: str, name: str) -> list[Any]:
    if len(raw) % np.dtype(kind).itemsize:
        raise _invalid(f"the bytes of `{name}` are not a whole number of elements", name)
    values: list[Any] = np.frombuffer(raw, kind).tolist()
    return values


def _split(raw: bytes, name: str) -> list[bytes]:
    """The elements of BYTES."""
    found, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise _invalid(f"the bytes of `{name}` end inside a length", name)
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > len(raw):
            raise _invalid(f"the bytes of `{name}` end inside an element", name)
        found.append(raw[at : at + size])
        at += size
    return found


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"`{name}` is not UTF-8", name) from error


def parameter_of(given: pb.InferParameter) -> Any:
    """Returns the value of a parameter, or None if it has none."""
    kind = given.WhichOneof("parameter_choice")
    return None if kind is None else getattr(given, kind)


def add_outputs(response: pb.ModelInferResponse, outputs: Sequence[Output], raw: bool) -> None:
    """Adds tensors to a response, as raw bytes or as typed lists."""
    for output in outputs:
        tensor = response.outputs.add(
            name=output.name, datatype=output.datatype, shape=output.shape
        )
        texts = output.datatype == "BYTES"
        values = [value.encode() for value in output.values] if texts else output.values
        if not raw:
            field = "bytes_contents" if texts else NUMBERS[output.datatype][1]
            getattr(tensor.contents, field).extend(values)
        elif texts:
            joined = b"".join(struct.pack("<I", len(value)) + value for value in values)
            response.raw_output_contents.append(joined)
        else:
            kind = NUMBERS[output.datatype][0]
            response.raw_output_contents.append(np.array(values, kind).tobytes())


def _invalid(message: str, field: str) -> RequestError:
    return RequestError(Fault.VALIDATION, message, field)
