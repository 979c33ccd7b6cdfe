"""What the inputs and parameters of the Open Inference Protocol mean, name by name."""

import json
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given as for_any
from hypothesis import strategies as st

from router.api.kserve_params import KNOWN, wish_of
from router.api.kserve_tensors import inputs_of
from router.ask import Ask, ConstraintKind, Params
from router.errors import RequestError
from router.kserve.v1 import inference_pb2
from tests.service.fake_service import FakeService
from tests.service.grpc_rig import failure, field_of
from tests.service.kserve_rig import client_of, parameters, raw_request


async def asks_of(*texts: str, **fields: Any) -> list[Ask]:
    service = FakeService()
    async with client_of(service) as client:
        await client.infer(raw_request(*texts, **fields))
    return service.asks


async def params_of(**fields: Any) -> Params:
    (ask,) = await asks_of("x", **fields)
    return ask.params


async def test_names_of_the_vllm_backend() -> None:
    given = {
        "max_tokens": "9",
        "min_tokens": 2,
        "temperature": "0.5",
        "top_p": 0.25,
        "top_k": -1,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": 2**60 + 1,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": "true",
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logit_bias": {"7": 1.5},
        "lora_name": "poet",
        "truncate_prompt_tokens": 3,
    }
    text = json.dumps(given)
    (ask,) = await asks_of("x", inputs={"sampling_parameters": ("BYTES", [text])})
    params = ask.params
    assert (params.max_tokens, params.min_tokens, params.temperature) == (9, 2, 0.5)
    assert (params.top_p, params.top_k, params.min_p) == (0.25, 0, 0.125)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.seed) == (1.5, 2**60 + 1)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (4,))
    assert params.ignore_eos
    assert params.include_stop
    assert not params.skip_special_tokens
    assert params.logit_bias == ((7, 1.5),)
    assert (ask.adapter, ask.truncate) == ("poet", 3)


async def test_names_of_the_tensorrt_llm_backend() -> None:
    inputs = {
        "request_output_len": ("INT32", [9]),
        "min_length": ("INT32", [2]),
        "temperature": ("FP32", [0.5]),
        "runtime_top_k": ("INT32", [3]),
        "runtime_top_p": ("FP32", [0.0]),
        "random_seed": ("UINT64", [2**63 + 1]),
        "stop_words": ("BYTES", ["a", "", "b"]),
        "bad_words": ("BYTES", [""]),
        "end_id": ("INT32", [5]),
        "pad_id": ("INT32", [5]),
        "beam_width": ("INT32", [1]),
        "len_penalty": ("FP32", [1.5]),
        "return_context_logits": ("BOOL", [False]),
        "exclude_input_in_output": ("BOOL", [True]),
    }
    params = await params_of(inputs=inputs)
    assert (params.max_tokens, params.min_tokens, params.temperature) == (9, 2, 0.5)
    assert (params.top_k, params.top_p, params.seed) == (3, 1.0, 2**63 + 1)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (5,))


async def test_parameters_of_the_request() -> None:
    given = parameters(max_tokens=4, temperature=0.0, stop='["a","b"]', ignore_eos=True)
    params = await params_of(parameters=given)
    assert (params.max_tokens, params.temperature) == (4, 0)
    assert params.stop == ("a", "b")
    assert params.ignore_eos
    params = await params_of(parameters=parameters(stop="[not a list"))
    assert params.stop == ("[not a list",)


async def test_nothing_said_is_neutral() -> None:
    (ask,) = await asks_of("x", parameters=parameters(triton_enable_empty_final_response=True))
    assert ask == Ask("x")


async def test_inputs_go_before_sampling_parameters_before_parameters() -> None:
    params = await params_of(
        parameters=parameters(max_tokens=1, top_k=1, min_tokens=1),
        inputs={
            "sampling_parameters": ("BYTES", ['{"max_tokens": 2, "top_k": 2}']),
            "max_tokens": ("INT32", [3]),
        },
    )
    assert (params.max_tokens, params.top_k, params.min_tokens) == (3, 2, 1)


async def test_each_prompt_may_have_its_own() -> None:
    inputs = {"max_tokens": ("INT32", [1, 2]), "temperature": ("FP32", [0.5])}
    first, second = await asks_of("x", "y", inputs=inputs)
    assert (first.params.max_tokens, second.params.max_tokens) == (1, 2)
    assert (first.params.temperature, second.params.temperature) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json_object": True}, ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
        ({"guided_json": {"type": "array"}}, ConstraintKind.JSON_SCHEMA, '{"type":"array"}'),
        ({"json_schema": '{"type": "array"}'}, ConstraintKind.JSON_SCHEMA, '{"type":"array"}'),
        ({"guided_regex": "a+"}, ConstraintKind.REGEX, "a+"),
        ({"guided_choice": ["a", "b"]}, ConstraintKind.LARK, "start: CHOICE"),
        ({"grammar": 'root ::= "x"'}, ConstraintKind.LARK, 'root ::= "x"'),
        (
            {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+"},
            ConstraintKind.REGEX,
            "a+",
        ),
        ({"guided_decoding_guide_type": "json"}, ConstraintKind.JSON_SCHEMA, '{"type":"object"}'),
    ],
)
async def test_constraints(given: dict[str, Any], kind: ConstraintKind, text: str) -> None:
    params = await params_of(inputs={"sampling_parameters": ("BYTES", [json.dumps(given)])})
    assert params.constraint is not None
    assert params.constraint.kind is kind
    assert params.constraint.text.startswith(text)


@pytest.mark.parametrize(
    ("given", "priority"), [(None, 1), (0, 1), (1, 0), (2, 1), (4, 3), (5, 1), (2**40, 1)]
)
async def test_priorities_count_from_one(given: int | None, priority: int) -> None:
    fields = {} if given is None else {"priority": given}
    (ask,) = await asks_of("x", parameters=parameters(**fields))
    assert ask.priority == priority


INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"temprature": 1}, MISSING),
        ({"sequence_id": 3}, MISSING),
        ({"n": 2}, MISSING),
        ({"use_beam_search": True}, MISSING),
        ({"return_generation_logits": True}, MISSING),
        ({"bad_words": "x"}, MISSING),
        ({"temperature": "warm"}, INVALID),
        ({"max_tokens": 1.5}, INVALID),
        ({"ignore_eos": "maybe"}, INVALID),
        ({"logit_bias": "[1]"}, INVALID),
        ({"json_schema": "{"}, INVALID),
        ({"guided_decoding_guide_type": "xml"}, INVALID),
    ],
)
async def test_what_means_nothing_is_refused_by_name(
    given: dict[str, Any], code: grpc.StatusCode
) -> None:
    async with client_of(FakeService()) as client:
        error = await failure(client.infer(raw_request("x", parameters=parameters(**given))))
    assert (error.code(), field_of(error)) == (code, next(iter(given)))


async def test_two_constraints_exclude_each_other() -> None:
    async with client_of(FakeService()) as client:
        given = parameters(regex="a", json_object=True)
        error = await failure(client.infer(raw_request("x", parameters=given)))
        assert (error.code(), field_of(error)) == (INVALID, "regex")


def broken(change: Any) -> Any:
    request = raw_request("x", inputs={"max_tokens": ("INT32", [1])})
    change(request)
    return request


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.raw_input_contents.pop(),
        lambda r: r.raw_input_contents.__setitem__(0, b"\x01\x00\x00"),
        lambda r: r.raw_input_contents.__setitem__(0, b"\x09\x00\x00\x00x"),
        lambda r: r.raw_input_contents.__setitem__(0, b"\x01\x00\x00\x00\xff"),
        lambda r: r.raw_input_contents.__setitem__(1, b"\x01\x00\x00"),
        lambda r: r.inputs[0].shape.__setitem__(0, 2),
        lambda r: r.inputs[0].shape.__setitem__(0, -1),
        lambda r: r.inputs[0].shape.extend([2**40, 2**40]),
        lambda r: r.inputs[0].shape.extend([1, 1]),
        lambda r: setattr(r.inputs[0], "name", "text"),
        lambda r: setattr(r.inputs[0], "datatype", "INT32"),
        lambda r: setattr(r.inputs[1], "datatype", "BF16"),
        lambda r: setattr(r.inputs[1], "name", "text_input"),
        lambda r: r.inputs.pop(0),
        lambda r: r.inputs[0].parameters.add(key="shared_memory_region"),
    ],
)
async def test_broken_tensors_are_refused(change: Any) -> None:
    async with client_of(FakeService()) as client:
        error = await failure(client.infer(broken(change)))
        assert error.code() in (INVALID, MISSING)
        (message,) = [one async for one in client.stream(iter([broken(change)]))]
        assert message.error_message == error.details()


async def test_no_prompt_is_refused() -> None:
    async with client_of(FakeService(), max_concurrent_requests=2) as client:
        for texts in ((), ("a", "b", "c")):
            error = await failure(client.infer(raw_request(*texts)))
            assert (error.code(), field_of(error)) == (INVALID, "text_input")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@for_any(st.dictionaries(st.sampled_from(sorted(KNOWN)), ANYTHING, max_size=4))
def test_whatever_is_said_is_read_or_refused(values: dict[str, Any]) -> None:
    said = {name: value for name, value in values.items() if value is not None}
    with suppress(RequestError):
        assert wish_of("x", said, inference_pb2.ModelInferRequest(), None).ask.prompt == "x"


@for_any(
    st.sampled_from(["BYTES", "BOOL", "INT32", "UINT64", "FP16", "FP32", "BF16", ""]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.binary(max_size=24),
)
def test_whatever_bytes_come_are_read_or_refused(
    datatype: str, shape: list[int], raw: bytes
) -> None:
    request = inference_pb2.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="text_input", datatype=datatype, shape=shape)
    with suppress(RequestError):
        tensor = inputs_of(request)["text_input"]
        assert len(tensor.values) == int(np.prod(tensor.shape))
