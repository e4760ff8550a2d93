from moeserve.v1 import moe_service_pb2 as _moe_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from moeserve.v1.moe_service_pb2 import ForwardRequest as ForwardRequest
from moeserve.v1.moe_service_pb2 import ForwardResponse as ForwardResponse
from moeserve.v1.moe_service_pb2 import OpenMemoryRequest as OpenMemoryRequest
from moeserve.v1.moe_service_pb2 import OpenMemoryResponse as OpenMemoryResponse
from moeserve.v1.moe_service_pb2 import SharedBlock as SharedBlock
from moeserve.v1.moe_service_pb2 import ForwardManyRequest as ForwardManyRequest
from moeserve.v1.moe_service_pb2 import ForwardManyResponse as ForwardManyResponse
from moeserve.v1.moe_service_pb2 import ForwardParts as ForwardParts
from moeserve.v1.moe_service_pb2 import Error as Error
from moeserve.v1.moe_service_pb2 import FieldViolation as FieldViolation
from moeserve.v1.moe_service_pb2 import ListLayersRequest as ListLayersRequest
from moeserve.v1.moe_service_pb2 import ListLayersResponse as ListLayersResponse
from moeserve.v1.moe_service_pb2 import LayerInfo as LayerInfo
from moeserve.v1.moe_service_pb2 import GetStatsRequest as GetStatsRequest
from moeserve.v1.moe_service_pb2 import GetStatsResponse as GetStatsResponse
from moeserve.v1.moe_service_pb2 import LayerStats as LayerStats
from moeserve.v1.moe_service_pb2 import HostShards as HostShards
from moeserve.v1.moe_service_pb2 import Durations as Durations
from moeserve.v1.moe_service_pb2 import CallCount as CallCount
from moeserve.v1.moe_service_pb2 import Event as Event
from moeserve.v1.moe_service_pb2 import HostStats as HostStats
from moeserve.v1.moe_service_pb2 import PlacedHost as PlacedHost
from moeserve.v1.moe_service_pb2 import Host as Host
from moeserve.v1.moe_service_pb2 import DropReason as DropReason

DESCRIPTOR: _descriptor.FileDescriptor
DROP_REASON_NONE: _moe_service_pb2.DropReason
DROP_REASON_CAPACITY: _moe_service_pb2.DropReason
DROP_REASON_HOST_LOST: _moe_service_pb2.DropReason
DROP_REASON_LATE: _moe_service_pb2.DropReason

class FrontendReport(_message.Message):
    __slots__ = ("name", "target", "metrics_target", "node", "public_key", "epoch", "oldest_epoch", "tried_epoch", "refusal", "is_leaving", "is_ready", "requested", "call_times", "counted")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    METRICS_TARGET_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OLDEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRIED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    IS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    CALL_TIMES_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    target: str
    metrics_target: str
    node: str
    public_key: str
    epoch: int
    oldest_epoch: int
    tried_epoch: int
    refusal: str
    is_leaving: bool
    is_ready: bool
    requested: _containers.RepeatedScalarFieldContainer[bytes]
    call_times: _containers.RepeatedScalarFieldContainer[int]
    counted: Counted
    def __init__(self, name: _Optional[str] = ..., target: _Optional[str] = ..., metrics_target: _Optional[str] = ..., node: _Optional[str] = ..., public_key: _Optional[str] = ..., epoch: _Optional[int] = ..., oldest_epoch: _Optional[int] = ..., tried_epoch: _Optional[int] = ..., refusal: _Optional[str] = ..., is_leaving: _Optional[bool] = ..., is_ready: _Optional[bool] = ..., requested: _Optional[_Iterable[bytes]] = ..., call_times: _Optional[_Iterable[int]] = ..., counted: _Optional[_Union[Counted, _Mapping]] = ...) -> None: ...

class Counted(_message.Message):
    __slots__ = ("series", "layers")
    SERIES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    series: _containers.RepeatedCompositeFieldContainer[Series]
    layers: _containers.RepeatedCompositeFieldContainer[LayerCounted]
    def __init__(self, series: _Optional[_Iterable[_Union[Series, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerCounted, _Mapping]]] = ...) -> None: ...

class Series(_message.Message):
    __slots__ = ("key", "values")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    key: _containers.RepeatedScalarFieldContainer[str]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, key: _Optional[_Iterable[str]] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class LayerCounted(_message.Message):
    __slots__ = ("tokens", "pairs")
    class PairsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    pairs: _containers.ScalarMap[str, bytes]
    def __init__(self, tokens: _Optional[int] = ..., pairs: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class FrontendOrder(_message.Message):
    __slots__ = ("setup", "current", "candidate", "hosts", "failing", "balancing", "busy", "missing_hosts", "wanted_hosts")
    class FailingEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: str
        def __init__(self, key: _Optional[int] = ..., value: _Optional[str] = ...) -> None: ...
    class BusyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    SETUP_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    FAILING_FIELD_NUMBER: _ClassVar[int]
    BALANCING_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    MISSING_HOSTS_FIELD_NUMBER: _ClassVar[int]
    WANTED_HOSTS_FIELD_NUMBER: _ClassVar[int]
    setup: Setup
    current: Release
    candidate: Release
    hosts: _containers.RepeatedCompositeFieldContainer[_moe_service_pb2.Host]
    failing: _containers.ScalarMap[int, str]
    balancing: Balancing
    busy: _containers.ScalarMap[int, float]
    missing_hosts: int
    wanted_hosts: int
    def __init__(self, setup: _Optional[_Union[Setup, _Mapping]] = ..., current: _Optional[_Union[Release, _Mapping]] = ..., candidate: _Optional[_Union[Release, _Mapping]] = ..., hosts: _Optional[_Iterable[_Union[_moe_service_pb2.Host, _Mapping]]] = ..., failing: _Optional[_Mapping[int, str]] = ..., balancing: _Optional[_Union[Balancing, _Mapping]] = ..., busy: _Optional[_Mapping[int, float]] = ..., missing_hosts: _Optional[int] = ..., wanted_hosts: _Optional[int] = ...) -> None: ...

class Balancing(_message.Message):
    __slots__ = ("rounds", "moved_experts", "moved_bytes", "balancedness", "latest", "changing")
    class RoundsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MOVED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    CHANGING_FIELD_NUMBER: _ClassVar[int]
    rounds: _containers.ScalarMap[str, int]
    moved_experts: int
    moved_bytes: int
    balancedness: _containers.RepeatedScalarFieldContainer[float]
    latest: str
    changing: str
    def __init__(self, rounds: _Optional[_Mapping[str, int]] = ..., moved_experts: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., balancedness: _Optional[_Iterable[float]] = ..., latest: _Optional[str] = ..., changing: _Optional[str] = ...) -> None: ...

class Setup(_message.Message):
    __slots__ = ("config_json", "public_key", "secret_key", "service_id", "drain_timeout_s")
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_KEY_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    config_json: str
    public_key: str
    secret_key: str
    service_id: str
    drain_timeout_s: float
    def __init__(self, config_json: _Optional[str] = ..., public_key: _Optional[str] = ..., secret_key: _Optional[str] = ..., service_id: _Optional[str] = ..., drain_timeout_s: _Optional[float] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("epoch", "num_hosts", "layers", "swaps", "files", "deployed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_HOSTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SWAPS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    DEPLOYED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_hosts: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlacement]
    swaps: _containers.RepeatedCompositeFieldContainer[Swap]
    files: _containers.RepeatedCompositeFieldContainer[FileMark]
    deployed: _containers.RepeatedCompositeFieldContainer[Deployed]
    def __init__(self, epoch: _Optional[int] = ..., num_hosts: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerPlacement, _Mapping]]] = ..., swaps: _Optional[_Iterable[_Union[Swap, _Mapping]]] = ..., files: _Optional[_Iterable[_Union[FileMark, _Mapping]]] = ..., deployed: _Optional[_Iterable[_Union[Deployed, _Mapping]]] = ...) -> None: ...

class FileMark(_message.Message):
    __slots__ = ("path", "size", "description", "numbers")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    description: bytes
    numbers: bytes
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., description: _Optional[bytes] = ..., numbers: _Optional[bytes] = ...) -> None: ...

class Deployed(_message.Message):
    __slots__ = ("layer", "files")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    layer: str
    files: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[str] = ..., files: _Optional[_Iterable[int]] = ...) -> None: ...

class LayerPlacement(_message.Message):
    __slots__ = ("unit_of_physical", "host_of_physical", "tensor_parallel")
    UNIT_OF_PHYSICAL_FIELD_NUMBER: _ClassVar[int]
    HOST_OF_PHYSICAL_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    unit_of_physical: bytes
    host_of_physical: bytes
    tensor_parallel: int
    def __init__(self, unit_of_physical: _Optional[bytes] = ..., host_of_physical: _Optional[bytes] = ..., tensor_parallel: _Optional[int] = ...) -> None: ...

class Swap(_message.Message):
    __slots__ = ("layer", "checkpoint", "experts", "revision", "files")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    layer: str
    checkpoint: str
    experts: _containers.RepeatedScalarFieldContainer[int]
    revision: int
    files: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[str] = ..., checkpoint: _Optional[str] = ..., experts: _Optional[_Iterable[int]] = ..., revision: _Optional[int] = ..., files: _Optional[_Iterable[int]] = ...) -> None: ...
