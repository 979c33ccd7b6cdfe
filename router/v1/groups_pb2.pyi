from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GroupState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GROUP_STATE_UNSPECIFIED: _ClassVar[GroupState]
    GROUP_STATE_DOWN: _ClassVar[GroupState]
    GROUP_STATE_UP: _ClassVar[GroupState]
    GROUP_STATE_LEAVING: _ClassVar[GroupState]
GROUP_STATE_UNSPECIFIED: GroupState
GROUP_STATE_DOWN: GroupState
GROUP_STATE_UP: GroupState
GROUP_STATE_LEAVING: GroupState

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups", "waiting")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStatus]
    waiting: int
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupStatus, _Mapping]]] = ..., waiting: _Optional[int] = ...) -> None: ...

class GroupStatus(_message.Message):
    __slots__ = ("name", "state", "model", "engine", "engine_version", "device", "addresses", "running", "kv_tokens", "kv_used", "kv_cached")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_FIELD_NUMBER: _ClassVar[int]
    KV_CACHED_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: GroupState
    model: str
    engine: str
    engine_version: str
    device: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    running: int
    kv_tokens: int
    kv_used: int
    kv_cached: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[GroupState, str]] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., device: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., running: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., kv_used: _Optional[int] = ..., kv_cached: _Optional[int] = ...) -> None: ...

class AddGroupRequest(_message.Message):
    __slots__ = ("group", "limit_s")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    group: str
    limit_s: float
    def __init__(self, group: _Optional[str] = ..., limit_s: _Optional[float] = ...) -> None: ...

class RemoveGroupRequest(_message.Message):
    __slots__ = ("name", "limit_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    limit_s: float
    def __init__(self, name: _Optional[str] = ..., limit_s: _Optional[float] = ...) -> None: ...

class SwitchGroupsRequest(_message.Message):
    __slots__ = ("group", "stop_first", "limit_s")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STOP_FIRST_FIELD_NUMBER: _ClassVar[int]
    LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    group: str
    stop_first: bool
    limit_s: float
    def __init__(self, group: _Optional[str] = ..., stop_first: bool = ..., limit_s: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("line", "loaded")
    LINE_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    line: str
    loaded: float
    def __init__(self, line: _Optional[str] = ..., loaded: _Optional[float] = ...) -> None: ...
