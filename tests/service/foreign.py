"""Messages of other projects' protocols, made from their field numbers alone.

They live in a pool of their own and share nothing with the generated code, so what passes between
the two is what the numbers say. ``*`` after a number means repeated.
"""

from typing import Any

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Fields = descriptor_pb2.FieldDescriptorProto

TGIS = {
    "BatchedGenerationRequest": (
        "1 model_id string, 2 prefix_id string, 3* requests GenerationRequest, "
        "4 adapter_id string, 10 params Parameters"
    ),
    "SingleGenerationRequest": (
        "1 model_id string, 2 prefix_id string, 3 request GenerationRequest, "
        "4 adapter_id string, 10 params Parameters"
    ),
    "BatchedGenerationResponse": "1* responses GenerationResponse",
    "GenerationRequest": "2 text string",
    "GenerationResponse": (
        "2 generated_token_count uint32, 4 text string, 6 input_token_count uint32, "
        "7 stop_reason int32, 8* tokens TokenInfo, 9* input_tokens TokenInfo, 10 seed uint64, "
        "11 stop_sequence string"
    ),
    "Parameters": (
        "1 method int32, 2 sampling SamplingParameters, 3 stopping StoppingCriteria, "
        "4 response ResponseOptions, 5 decoding DecodingParameters, "
        "6 truncate_input_tokens uint32"
    ),
    "SamplingParameters": (
        "1 temperature float, 2 top_k uint32, 3 top_p float, 4 typical_p float, 5 seed uint64"
    ),
    "StoppingCriteria": (
        "1 max_new_tokens uint32, 2 min_new_tokens uint32, 3 time_limit_millis uint32, "
        "4* stop_sequences string, 5 include_stop_sequence bool"
    ),
    "ResponseOptions": (
        "1 input_text bool, 2 generated_tokens bool, 3 input_tokens bool, 4 token_logprobs bool, "
        "5 token_ranks bool, 6 top_n_tokens uint32"
    ),
    "LengthPenalty": "1 start_index uint32, 2 decay_factor float",
    "StringChoices": "1* choices string",
    "DecodingParameters": (
        "1 repetition_penalty float, 2 length_penalty LengthPenalty, 3 format int32, "
        "4 json_schema string, 5 regex string, 6 choice StringChoices, 7 grammar string"
    ),
    "TopToken": "2 text string, 3 logprob float",
    "TokenInfo": "2 text string, 3 logprob float, 4 rank uint32, 5* top_tokens TopToken",
    "BatchedTokenizeRequest": (
        "1 model_id string, 2* requests TokenizeRequest, 3 return_tokens bool, "
        "4 return_offsets bool, 5 truncate_input_tokens uint32, 6 prefix_id string, "
        "7 adapter_id string"
    ),
    "TokenizeRequest": "1 text string",
    "BatchedTokenizeResponse": "1* responses TokenizeResponse",
    "Offset": "1 start uint32, 2 end uint32",
    "TokenizeResponse": "1 token_count uint32, 2* tokens string, 3* offsets Offset",
    "ModelInfoRequest": "1 model_id string",
    "ModelInfoResponse": (
        "1 model_kind int32, 2 max_sequence_length uint32, 3 max_new_tokens uint32"
    ),
}
GREEDY, SAMPLE = 0, 1
NOT_FINISHED, MAX_TOKENS, EOS_TOKEN, CANCELLED, TIME_LIMIT, STOP_SEQUENCE, TOKEN_LIMIT = range(7)

TRITON = {
    "Nothing": "",
    "Named": "1 name string, 2 version string",
    "ServerLiveResponse": "1 live bool",
    "ServerReadyResponse": "1 ready bool",
    "ModelReadyResponse": "1 ready bool",
    "ServerMetadataResponse": "1 name string, 2 version string, 3* extensions string",
    "TensorMetadata": "1 name string, 2 datatype string, 3* shape int64",
    "ModelMetadataResponse": (
        "1 name string, 2* versions string, 3 platform string, 4* inputs TensorMetadata, "
        "5* outputs TensorMetadata"
    ),
    "Parameter": (
        "1 bool_param bool, 2 int64_param int64, 3 string_param string, 4 double_param double, "
        "5 uint64_param uint64"
    ),
    "Entry": "1 key string, 2 value Parameter",
    "Contents": (
        "1* bool_contents bool, 2* int_contents int32, 3* int64_contents int64, "
        "4* uint_contents uint32, 5* uint64_contents uint64, 6* fp32_contents float, "
        "7* fp64_contents double, 8* bytes_contents bytes"
    ),
    "Tensor": (
        "1 name string, 2 datatype string, 3* shape int64, 4* parameters Entry, 5 contents Contents"
    ),
    "Wanted": "1 name string, 2* parameters Entry",
    "ModelInferRequest": (
        "1 model_name string, 2 model_version string, 3 id string, 4* parameters Entry, "
        "5* inputs Tensor, 6* outputs Wanted, 7* raw_input_contents bytes"
    ),
    "ModelInferResponse": (
        "1 model_name string, 2 model_version string, 3 id string, 4* parameters Entry, "
        "5* outputs Tensor, 6* raw_output_contents bytes"
    ),
    "ModelStreamInferResponse": "1 error_message string, 2 infer_response ModelInferResponse",
    "ModelInput": "1 name string, 2 data_type int32, 4* dims int64, 8 optional bool",
    "ModelOutput": "1 name string, 2 data_type int32, 3* dims int64",
    "Policy": "1 decoupled bool",
    "Text": "1 string_value string",
    "TextEntry": "1 key string, 2 value Text",
    "ModelConfig": (
        "1 name string, 2 platform string, 4 max_batch_size int32, 5* input ModelInput, "
        "6* output ModelOutput, 14* parameters TextEntry, 17 backend string, "
        "19 model_transaction_policy Policy"
    ),
    "ModelConfigResponse": "1 config ModelConfig",
    "Duration": "1 count uint64, 2 ns uint64",
    "InferStatistics": (
        "1 success Duration, 2 fail Duration, 3 queue Duration, 4 compute_input Duration, "
        "5 compute_infer Duration, 6 compute_output Duration"
    ),
    "BatchStatistics": "1 batch_size uint64, 3 compute_infer Duration",
    "ModelStatistics": (
        "1 name string, 2 version string, 3 last_inference uint64, 4 inference_count uint64, "
        "5 execution_count uint64, 6 inference_stats InferStatistics, "
        "7* batch_stats BatchStatistics"
    ),
    "ModelStatisticsResponse": "1* model_stats ModelStatistics",
    "RepositoryIndexRequest": "1 repository_name string, 2 ready bool",
    "ModelIndex": "1 name string, 2 version string, 3 state string, 4 reason string",
    "RepositoryIndexResponse": "1* models ModelIndex",
}


def messages(package: str, specs: dict[str, str]) -> dict[str, Any]:
    """The classes of these messages, by name. Every field tells whether it is set."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto2"
    )
    for name, spec in specs.items():
        made = file.message_type.add(name=name)
        for field in filter(None, spec.split(", ")):
            number, called, kind = field.split()
            label = Fields.LABEL_REPEATED if number.endswith("*") else Fields.LABEL_OPTIONAL
            added = made.field.add(name=called, number=int(number.rstrip("*")), label=label)
            if kind in specs:
                added.type = Fields.TYPE_MESSAGE
                added.type_name = f".{package}.{kind}"
            else:
                added.type = Fields.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in specs
    }


def unary(channel: grpc.aio.Channel, path: str, response: Any) -> Any:
    """A method with one answer, called with these classes."""
    return channel.unary_unary(path, lambda one: one.SerializeToString(), response.FromString)


def stream(channel: grpc.aio.Channel, path: str, response: Any) -> Any:
    """A method with many answers."""
    return channel.unary_stream(path, lambda one: one.SerializeToString(), response.FromString)


def both_ways(channel: grpc.aio.Channel, path: str, response: Any) -> Any:
    """A method with many requests and answers."""
    return channel.stream_stream(path, lambda one: one.SerializeToString(), response.FromString)
