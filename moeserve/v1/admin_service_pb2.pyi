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

class SwapExpertsRequest(_message.Message):
    __slots__ = ("layer", "checkpoint", "experts", "layer_index")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYER_INDEX_FIELD_NUMBER: _ClassVar[int]
    layer: str
    checkpoint: str
    experts: _containers.RepeatedScalarFieldContainer[int]
    layer_index: int
    def __init__(self, layer: _Optional[str] = ..., checkpoint: _Optional[str] = ..., experts: _Optional[_Iterable[int]] = ..., layer_index: _Optional[int] = ...) -> None: ...

class SwapExpertsResponse(_message.Message):
    __slots__ = ("epoch", "model_revision")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    model_revision: int
    def __init__(self, epoch: _Optional[int] = ..., model_revision: _Optional[int] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("hosts", "all")
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    hosts: int
    all: bool
    def __init__(self, hosts: _Optional[int] = ..., all: _Optional[bool] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("epoch", "hosts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hosts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., hosts: _Optional[_Iterable[str]] = ...) -> None: ...

class ScaleCopiesRequest(_message.Message):
    __slots__ = ("layer", "expert", "copies", "layer_index")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    LAYER_INDEX_FIELD_NUMBER: _ClassVar[int]
    layer: str
    expert: int
    copies: int
    layer_index: int
    def __init__(self, layer: _Optional[str] = ..., expert: _Optional[int] = ..., copies: _Optional[int] = ..., layer_index: _Optional[int] = ...) -> None: ...

class ScaleCopiesResponse(_message.Message):
    __slots__ = ("epoch", "hosts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hosts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., hosts: _Optional[_Iterable[str]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("epoch", "moves", "new", "kept", "moved_bytes", "steps", "balancedness_before", "balancedness")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    NEW_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    moves: int
    new: int
    kept: int
    moved_bytes: int
    steps: int
    balancedness_before: float
    balancedness: float
    def __init__(self, epoch: _Optional[int] = ..., moves: _Optional[int] = ..., new: _Optional[int] = ..., kept: _Optional[int] = ..., moved_bytes: _Optional[int] = ..., steps: _Optional[int] = ..., balancedness_before: _Optional[float] = ..., balancedness: _Optional[float] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("follow",)
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    follow: bool
    def __init__(self, follow: _Optional[bool] = ...) -> None: ...

class AuditEvent(_message.Message):
    __slots__ = ("number", "time_unix_s", "duration_s", "kind", "what", "why", "outcome", "error", "epoch", "moves", "new", "moved_bytes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    NEW_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    number: int
    time_unix_s: float
    duration_s: float
    kind: str
    what: str
    why: str
    outcome: str
    error: str
    epoch: int
    moves: int
    new: int
    moved_bytes: int
    def __init__(self, number: _Optional[int] = ..., time_unix_s: _Optional[float] = ..., duration_s: _Optional[float] = ..., kind: _Optional[str] = ..., what: _Optional[str] = ..., why: _Optional[str] = ..., outcome: _Optional[str] = ..., error: _Optional[str] = ..., epoch: _Optional[int] = ..., moves: _Optional[int] = ..., new: _Optional[int] = ..., moved_bytes: _Optional[int] = ...) -> None: ...

class DrainHostRequest(_message.Message):
    __slots__ = ("host",)
    HOST_FIELD_NUMBER: _ClassVar[int]
    host: str
    def __init__(self, host: _Optional[str] = ...) -> None: ...

class DrainHostResponse(_message.Message):
    __slots__ = ("epoch", "hosts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hosts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., hosts: _Optional[_Iterable[str]] = ...) -> None: ...

class GetPlacementRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPlacementResponse(_message.Message):
    __slots__ = ("epoch", "is_changing", "wanted_hosts", "shortage", "hosts", "frontends", "layers", "changing")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_CHANGING_FIELD_NUMBER: _ClassVar[int]
    WANTED_HOSTS_FIELD_NUMBER: _ClassVar[int]
    SHORTAGE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    CHANGING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    is_changing: bool
    wanted_hosts: str
    shortage: str
    hosts: _containers.RepeatedCompositeFieldContainer[_moe_service_pb2.PlacedHost]
    frontends: _containers.RepeatedCompositeFieldContainer[FollowingFrontend]
    layers: _containers.RepeatedCompositeFieldContainer[PlacedLayer]
    changing: str
    def __init__(self, epoch: _Optional[int] = ..., is_changing: _Optional[bool] = ..., wanted_hosts: _Optional[str] = ..., shortage: _Optional[str] = ..., hosts: _Optional[_Iterable[_Union[_moe_service_pb2.PlacedHost, _Mapping]]] = ..., frontends: _Optional[_Iterable[_Union[FollowingFrontend, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[PlacedLayer, _Mapping]]] = ..., changing: _Optional[str] = ...) -> None: ...

class FollowingFrontend(_message.Message):
    __slots__ = ("name", "target", "metrics_target", "node", "epoch", "is_ready")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    METRICS_TARGET_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    name: str
    target: str
    metrics_target: str
    node: str
    epoch: int
    is_ready: bool
    def __init__(self, name: _Optional[str] = ..., target: _Optional[str] = ..., metrics_target: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., is_ready: _Optional[bool] = ...) -> None: ...

class PlacedLayer(_message.Message):
    __slots__ = ("name", "model_revision", "tensor_parallel", "placement", "copies", "demand_rows_per_s", "host_balancedness")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    DEMAND_ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    HOST_BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_revision: int
    tensor_parallel: int
    placement: _containers.RepeatedCompositeFieldContainer[PlacedExperts]
    copies: _containers.RepeatedScalarFieldContainer[int]
    demand_rows_per_s: _containers.RepeatedScalarFieldContainer[float]
    host_balancedness: float
    def __init__(self, name: _Optional[str] = ..., model_revision: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., placement: _Optional[_Iterable[_Union[PlacedExperts, _Mapping]]] = ..., copies: _Optional[_Iterable[int]] = ..., demand_rows_per_s: _Optional[_Iterable[float]] = ..., host_balancedness: _Optional[float] = ...) -> None: ...

class PlacedExperts(_message.Message):
    __slots__ = ("host", "experts", "shards")
    HOST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    host: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, host: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., shards: _Optional[_Iterable[int]] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShutdownResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("role", "version", "epoch", "is_ready", "reason")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    role: str
    version: str
    epoch: int
    is_ready: bool
    reason: str
    def __init__(self, role: _Optional[str] = ..., version: _Optional[str] = ..., epoch: _Optional[int] = ..., is_ready: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...
