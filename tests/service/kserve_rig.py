"""A client of the Open Inference Protocol that knows its numbers only."""

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import numpy as np

from tests.service import foreign
from tests.service.fake_service import FakeService
from tests.service.grpc_rig import channel_of

PB = foreign.messages("inference", foreign.TRITON)
PATH = "/inference.GRPCInferenceService"


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.infer = foreign.unary(channel, f"{PATH}/ModelInfer", PB["ModelInferResponse"])
        self.stream = foreign.both_ways(
            channel, f"{PATH}/ModelStreamInfer", PB["ModelStreamInferResponse"]
        )

    async def ask(self, method: str, response: str, request: Any = None) -> Any:
        call = foreign.unary(self.channel, f"{PATH}/{method}", PB[response])
        return await call(PB["Nothing"]() if request is None else request)


@asynccontextmanager
async def client_of(service: FakeService, **given: Any) -> AsyncIterator[Client]:
    async with channel_of(service, **given) as channel:
        yield Client(channel)


def text_bytes(*texts: str) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def raw_request(
    *texts: str, inputs: dict[str, tuple[str, Sequence[Any]]] | None = None, **fields: Any
) -> Any:
    """A request as tritonclient writes it: raw bytes."""
    request = PB["ModelInferRequest"](**fields)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
    request.raw_input_contents.append(text_bytes(*texts))
    for name, (datatype, values) in (inputs or {}).items():
        request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        kinds = {"BOOL": "?", "INT32": "<i4", "FP32": "<f4", "UINT64": "<u8", "FP16": "<f2"}
        raw = text_bytes(*values) if datatype == "BYTES" else np.array(values, kinds[datatype])
        request.raw_input_contents.append(raw if isinstance(raw, bytes) else raw.tobytes())
    return request


def parameters(**values: Any) -> list[dict[str, Any]]:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return [{"key": name, "value": {kinds[type(one)]: one}} for name, one in values.items()]


def outputs_of(response: Any) -> dict[str, list[Any]]:
    """The outputs of a raw answer, by name."""
    found: dict[str, list[Any]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            values, at = [], 0
            while at < len(raw):
                (size,) = struct.unpack_from("<I", raw, at)
                values.append(raw[at + 4 : at + 4 + size].decode())
                at += 4 + size
        else:
            values = np.frombuffer(raw, {"FP32": "<f4", "UINT32": "<u4"}[output.datatype]).tolist()
        assert len(values) == int(np.prod(output.shape))
        found[output.name] = values
    return found


def final(response: Any) -> bool:
    (entry,) = response.parameters
    assert entry.key == "triton_final_response"
    return bool(entry.value.bool_param)
