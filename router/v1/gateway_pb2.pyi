from shards.v1 import shard_pb2 as _shard_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_EOS: _ClassVar[EndReason]
    END_REASON_STOP_TOKEN: _ClassVar[EndReason]
    END_REASON_LENGTH: _ClassVar[EndReason]
    END_REASON_STOP_STRING: _ClassVar[EndReason]
    END_REASON_CANCELLED: _ClassVar[EndReason]
    END_REASON_DEADLINE: _ClassVar[EndReason]
    END_REASON_OVERLOADED: _ClassVar[EndReason]
    END_REASON_TOO_LONG: _ClassVar[EndReason]
    END_REASON_UNSUPPORTED: _ClassVar[EndReason]
    END_REASON_WORKER_LOST: _ClassVar[EndReason]
    END_REASON_ENGINE_FAILED: _ClassVar[EndReason]
    END_REASON_SHUTDOWN: _ClassVar[EndReason]
END_REASON_UNSPECIFIED: EndReason
END_REASON_EOS: EndReason
END_REASON_STOP_TOKEN: EndReason
END_REASON_LENGTH: EndReason
END_REASON_STOP_STRING: EndReason
END_REASON_CANCELLED: EndReason
END_REASON_DEADLINE: EndReason
END_REASON_OVERLOADED: EndReason
END_REASON_TOO_LONG: EndReason
END_REASON_UNSUPPORTED: EndReason
END_REASON_WORKER_LOST: EndReason
END_REASON_ENGINE_FAILED: EndReason
END_REASON_SHUTDOWN: EndReason

class FromGateway(_message.Message):
    __slots__ = ("hello", "submits", "ends")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    ends: _containers.RepeatedCompositeFieldContainer[End]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[End, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "model", "prompt", "max_tokens", "stop_tokens", "needs", "priority", "deadline_ms", "sampling", "adapter", "traceparent", "tracestate")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    request: int
    model: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    stop_tokens: _containers.RepeatedScalarFieldContainer[int]
    needs: _containers.RepeatedScalarFieldContainer[str]
    priority: int
    deadline_ms: int
    sampling: _shard_pb2.Sampling
    adapter: str
    traceparent: str
    tracestate: str
    def __init__(self, request: _Optional[int] = ..., model: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., stop_tokens: _Optional[_Iterable[int]] = ..., needs: _Optional[_Iterable[str]] = ..., priority: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., sampling: _Optional[_Union[_shard_pb2.Sampling, _Mapping]] = ..., adapter: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("request", "reason")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request: int
    reason: EndReason
    def __init__(self, request: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ...) -> None: ...

class ToGateway(_message.Message):
    __slots__ = ("welcome", "delivery", "fleet", "closing")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    delivery: Delivery
    fleet: Fleet
    closing: Closing
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., delivery: _Optional[_Union[Delivery, _Mapping]] = ..., fleet: _Optional[_Union[Fleet, _Mapping]] = ..., closing: _Optional[_Union[Closing, _Mapping]] = ...) -> None: ...

class Closing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("limits", "fleet")
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    limits: Limits
    fleet: Fleet
    def __init__(self, limits: _Optional[_Union[Limits, _Mapping]] = ..., fleet: _Optional[_Union[Fleet, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_top_n_tokens", "max_input_tokens", "max_total_tokens", "max_batch_prefill_tokens", "max_batch_total_tokens", "max_batch_size", "waiting_served_ratio", "max_waiting_tokens", "max_client_batch_size", "payload_limit", "request_deadline_s", "disable_grammar_support", "watermark_gamma", "watermark_delta", "watermark_key")
    MAX_CONCURRENT_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BEST_OF_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    WAITING_SERVED_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CLIENT_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_LIMIT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    DISABLE_GRAMMAR_SUPPORT_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_GAMMA_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_DELTA_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_KEY_FIELD_NUMBER: _ClassVar[int]
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_batch_size: int
    waiting_served_ratio: float
    max_waiting_tokens: int
    max_client_batch_size: int
    payload_limit: int
    request_deadline_s: float
    disable_grammar_support: bool
    watermark_gamma: float
    watermark_delta: float
    watermark_key: int
    def __init__(self, max_concurrent_requests: _Optional[int] = ..., max_best_of: _Optional[int] = ..., max_stop_sequences: _Optional[int] = ..., max_top_n_tokens: _Optional[int] = ..., max_input_tokens: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_batch_prefill_tokens: _Optional[int] = ..., max_batch_total_tokens: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., waiting_served_ratio: _Optional[float] = ..., max_waiting_tokens: _Optional[int] = ..., max_client_batch_size: _Optional[int] = ..., payload_limit: _Optional[int] = ..., request_deadline_s: _Optional[float] = ..., disable_grammar_support: bool = ..., watermark_gamma: _Optional[float] = ..., watermark_delta: _Optional[float] = ..., watermark_key: _Optional[int] = ...) -> None: ...

class Fleet(_message.Message):
    __slots__ = ("groups", "expecting")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    EXPECTING_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[FleetGroup]
    expecting: bool
    def __init__(self, groups: _Optional[_Iterable[_Union[FleetGroup, _Mapping]]] = ..., expecting: bool = ...) -> None: ...

class FleetGroup(_message.Message):
    __slots__ = ("name", "model", "card")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CARD_FIELD_NUMBER: _ClassVar[int]
    name: str
    model: str
    card: FleetCard
    def __init__(self, name: _Optional[str] = ..., model: _Optional[str] = ..., card: _Optional[_Union[FleetCard, _Mapping]] = ...) -> None: ...

class FleetCard(_message.Message):
    __slots__ = ("model", "engine", "engine_version", "device", "dtype", "scheduling", "world", "kv_tokens", "page_tokens", "sequences_max", "step_tokens_max", "length_max", "shares_prefix", "donor_tokens_max", "features", "eos_token_ids", "vocab_size", "tokenizer_sha256", "instances", "load_seconds", "weight_bytes", "warnings", "ready", "adapters", "embed_tokens_max")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULING_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MAX_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    LENGTH_MAX_FIELD_NUMBER: _ClassVar[int]
    SHARES_PREFIX_FIELD_NUMBER: _ClassVar[int]
    DONOR_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    EMBED_TOKENS_MAX_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    engine_version: str
    device: str
    dtype: str
    scheduling: str
    world: int
    kv_tokens: int
    page_tokens: int
    sequences_max: int
    step_tokens_max: int
    length_max: int
    shares_prefix: bool
    donor_tokens_max: int
    features: _containers.RepeatedScalarFieldContainer[str]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    tokenizer_sha256: str
    instances: _containers.RepeatedScalarFieldContainer[str]
    load_seconds: float
    weight_bytes: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    ready: bool
    adapters: _containers.RepeatedScalarFieldContainer[str]
    embed_tokens_max: int
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., scheduling: _Optional[str] = ..., world: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., page_tokens: _Optional[int] = ..., sequences_max: _Optional[int] = ..., step_tokens_max: _Optional[int] = ..., length_max: _Optional[int] = ..., shares_prefix: bool = ..., donor_tokens_max: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., tokenizer_sha256: _Optional[str] = ..., instances: _Optional[_Iterable[str]] = ..., load_seconds: _Optional[float] = ..., weight_bytes: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ..., ready: bool = ..., adapters: _Optional[_Iterable[str]] = ..., embed_tokens_max: _Optional[int] = ...) -> None: ...

class Delivery(_message.Message):
    __slots__ = ("requests", "tokens", "logprobs_at", "logprobs", "starts", "closes", "prompts")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_AT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CLOSES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    logprobs_at: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_shard_pb2.TokenLogprobs]
    starts: _containers.RepeatedCompositeFieldContainer[Start]
    closes: _containers.RepeatedCompositeFieldContainer[Close]
    prompts: _containers.RepeatedCompositeFieldContainer[PromptScores]
    def __init__(self, requests: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ..., logprobs_at: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_shard_pb2.TokenLogprobs, _Mapping]]] = ..., starts: _Optional[_Iterable[_Union[Start, _Mapping]]] = ..., closes: _Optional[_Iterable[_Union[Close, _Mapping]]] = ..., prompts: _Optional[_Iterable[_Union[PromptScores, _Mapping]]] = ...) -> None: ...

class PromptScores(_message.Message):
    __slots__ = ("request", "values")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    request: int
    values: _containers.RepeatedCompositeFieldContainer[_shard_pb2.TokenLogprobs]
    def __init__(self, request: _Optional[int] = ..., values: _Optional[_Iterable[_Union[_shard_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("request", "cached_tokens", "queued_ms")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_MS_FIELD_NUMBER: _ClassVar[int]
    request: int
    cached_tokens: int
    queued_ms: int
    def __init__(self, request: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., queued_ms: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("request", "reason", "detail")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    request: int
    reason: EndReason
    detail: str
    def __init__(self, request: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class GroupPrepareRequest(_message.Message):
    __slots__ = ("group", "request")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    group: str
    request: _shard_pb2.PrepareRequest
    def __init__(self, group: _Optional[str] = ..., request: _Optional[_Union[_shard_pb2.PrepareRequest, _Mapping]] = ...) -> None: ...

class GroupEmbedRequest(_message.Message):
    __slots__ = ("group", "request")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    group: str
    request: _shard_pb2.EmbedRequest
    def __init__(self, group: _Optional[str] = ..., request: _Optional[_Union[_shard_pb2.EmbedRequest, _Mapping]] = ...) -> None: ...
