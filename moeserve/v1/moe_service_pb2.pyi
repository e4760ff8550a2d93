from moeserve.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_NONE: _ClassVar[DropReason]
    DROP_REASON_CAPACITY: _ClassVar[DropReason]
    DROP_REASON_HOST_LOST: _ClassVar[DropReason]
    DROP_REASON_LATE: _ClassVar[DropReason]
DROP_REASON_NONE: DropReason
DROP_REASON_CAPACITY: DropReason
DROP_REASON_HOST_LOST: DropReason
DROP_REASON_LATE: DropReason

class ForwardRequest(_message.Message):
    __slots__ = ("request_id", "model", "layer_index", "layer_name", "hidden_states", "used_token", "topk_ids", "topk_weights", "return_routing", "token_ids", "capacity_factor", "noise", "seed", "shared")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_NAME_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    USED_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RETURN_ROUTING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    layer_index: int
    layer_name: str
    hidden_states: _tensor_pb2.Tensor
    used_token: _tensor_pb2.Tensor
    topk_ids: _tensor_pb2.Tensor
    topk_weights: _tensor_pb2.Tensor
    return_routing: bool
    token_ids: _tensor_pb2.Tensor
    capacity_factor: float
    noise: str
    seed: int
    shared: SharedBlock
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., layer_index: _Optional[int] = ..., layer_name: _Optional[str] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., used_token: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., return_routing: _Optional[bool] = ..., token_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., capacity_factor: _Optional[float] = ..., noise: _Optional[str] = ..., seed: _Optional[int] = ..., shared: _Optional[_Union[SharedBlock, _Mapping]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("request_id", "hidden_states", "requested", "processed", "dropped", "aux_loss", "z_loss", "dropped_tokens", "topk_ids", "topk_weights", "error", "slots", "drop_reasons", "model_revision", "is_shared")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    AUX_LOSS_FIELD_NUMBER: _ClassVar[int]
    Z_LOSS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DROP_REASONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    IS_SHARED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    hidden_states: _tensor_pb2.Tensor
    requested: _tensor_pb2.Tensor
    processed: _tensor_pb2.Tensor
    dropped: _tensor_pb2.Tensor
    aux_loss: float
    z_loss: float
    dropped_tokens: _tensor_pb2.Tensor
    topk_ids: _tensor_pb2.Tensor
    topk_weights: _tensor_pb2.Tensor
    error: Error
    slots: _tensor_pb2.Tensor
    drop_reasons: _tensor_pb2.Tensor
    model_revision: int
    is_shared: bool
    def __init__(self, request_id: _Optional[str] = ..., hidden_states: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., requested: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., processed: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., dropped: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., aux_loss: _Optional[float] = ..., z_loss: _Optional[float] = ..., dropped_tokens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_ids: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., topk_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., slots: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., drop_reasons: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., model_revision: _Optional[int] = ..., is_shared: _Optional[bool] = ...) -> None: ...

class OpenMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenMemoryResponse(_message.Message):
    __slots__ = ("socket",)
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    socket: bytes
    def __init__(self, socket: _Optional[bytes] = ...) -> None: ...

class SharedBlock(_message.Message):
    __slots__ = ("memory", "offset", "reply_offset")
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    REPLY_OFFSET_FIELD_NUMBER: _ClassVar[int]
    memory: bytes
    offset: int
    reply_offset: int
    def __init__(self, memory: _Optional[bytes] = ..., offset: _Optional[int] = ..., reply_offset: _Optional[int] = ...) -> None: ...

class ForwardManyRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ForwardRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ForwardRequest, _Mapping]]] = ...) -> None: ...

class ForwardManyResponse(_message.Message):
    __slots__ = ("responses",)
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[ForwardResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[ForwardResponse, _Mapping]]] = ...) -> None: ...

class ForwardParts(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, parts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_ms", "violations")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_after_ms: int
    violations: _containers.RepeatedCompositeFieldContainer[FieldViolation]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., violations: _Optional[_Iterable[_Union[FieldViolation, _Mapping]]] = ...) -> None: ...

class FieldViolation(_message.Message):
    __slots__ = ("field", "description")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    field: str
    description: str
    def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class ListLayersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLayersResponse(_message.Message):
    __slots__ = ("model", "layers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layers: _containers.RepeatedCompositeFieldContainer[LayerInfo]
    def __init__(self, model: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[LayerInfo, _Mapping]]] = ...) -> None: ...

class LayerInfo(_message.Message):
    __slots__ = ("index", "name", "hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "dtype", "capacity_factor")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    dtype: _tensor_pb2.DType
    capacity_factor: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., activation: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., capacity_factor: _Optional[float] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("epoch", "layers", "hosts", "queue_tokens", "uptime_s", "expert_retries", "requests", "stages", "calls", "events", "changing")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_RETRIES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    CHANGING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerStats]
    hosts: _containers.RepeatedCompositeFieldContainer[HostStats]
    queue_tokens: int
    uptime_s: float
    expert_retries: int
    requests: _containers.RepeatedCompositeFieldContainer[Durations]
    stages: _containers.RepeatedCompositeFieldContainer[Durations]
    calls: _containers.RepeatedCompositeFieldContainer[CallCount]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    changing: str
    def __init__(self, epoch: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerStats, _Mapping]]] = ..., hosts: _Optional[_Iterable[_Union[HostStats, _Mapping]]] = ..., queue_tokens: _Optional[int] = ..., uptime_s: _Optional[float] = ..., expert_retries: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[Durations, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[Durations, _Mapping]]] = ..., calls: _Optional[_Iterable[_Union[CallCount, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., changing: _Optional[str] = ...) -> None: ...

class LayerStats(_message.Message):
    __slots__ = ("index", "name", "tokens", "processed", "dropped", "live_copies", "tensor_parallel", "placement", "host_balancedness")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROCESSED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    LIVE_COPIES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    HOST_BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    tokens: int
    processed: _containers.RepeatedScalarFieldContainer[int]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    live_copies: _containers.RepeatedScalarFieldContainer[int]
    tensor_parallel: int
    placement: _containers.RepeatedCompositeFieldContainer[HostShards]
    host_balancedness: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., tokens: _Optional[int] = ..., processed: _Optional[_Iterable[int]] = ..., dropped: _Optional[_Iterable[int]] = ..., live_copies: _Optional[_Iterable[int]] = ..., tensor_parallel: _Optional[int] = ..., placement: _Optional[_Iterable[_Union[HostShards, _Mapping]]] = ..., host_balancedness: _Optional[float] = ...) -> None: ...

class HostShards(_message.Message):
    __slots__ = ("host", "experts", "shards")
    HOST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    host: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, host: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., shards: _Optional[_Iterable[int]] = ...) -> None: ...

class Durations(_message.Message):
    __slots__ = ("name", "upper_bounds_s", "counts", "sum_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UPPER_BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    upper_bounds_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    def __init__(self, name: _Optional[str] = ..., upper_bounds_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...

class CallCount(_message.Message):
    __slots__ = ("method", "code", "count")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    method: str
    code: str
    count: int
    def __init__(self, method: _Optional[str] = ..., code: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_unix_s", "kind", "subject", "count")
    TIME_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    time_unix_s: float
    kind: str
    subject: str
    count: int
    def __init__(self, time_unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class HostStats(_message.Message):
    __slots__ = ("name", "up", "restarts", "node", "device", "cuda_visible_devices", "weights_bytes", "queue_tokens", "number", "num_threads", "state", "experts_held", "busy_ratio")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CUDA_VISIBLE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HELD_FIELD_NUMBER: _ClassVar[int]
    BUSY_RATIO_FIELD_NUMBER: _ClassVar[int]
    name: str
    up: bool
    restarts: int
    node: str
    device: str
    cuda_visible_devices: str
    weights_bytes: int
    queue_tokens: int
    number: int
    num_threads: int
    state: str
    experts_held: int
    busy_ratio: float
    def __init__(self, name: _Optional[str] = ..., up: _Optional[bool] = ..., restarts: _Optional[int] = ..., node: _Optional[str] = ..., device: _Optional[str] = ..., cuda_visible_devices: _Optional[str] = ..., weights_bytes: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., number: _Optional[int] = ..., num_threads: _Optional[int] = ..., state: _Optional[str] = ..., experts_held: _Optional[int] = ..., busy_ratio: _Optional[float] = ...) -> None: ...

class PlacedHost(_message.Message):
    __slots__ = ("name", "node", "is_up", "pid", "device", "cuda_visible_devices", "weights_bytes", "number", "num_threads", "experts_held")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    IS_UP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CUDA_VISIBLE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    node: str
    is_up: bool
    pid: int
    device: str
    cuda_visible_devices: str
    weights_bytes: int
    number: int
    num_threads: int
    experts_held: int
    def __init__(self, name: _Optional[str] = ..., node: _Optional[str] = ..., is_up: _Optional[bool] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., cuda_visible_devices: _Optional[str] = ..., weights_bytes: _Optional[int] = ..., number: _Optional[int] = ..., num_threads: _Optional[int] = ..., experts_held: _Optional[int] = ...) -> None: ...

class Host(_message.Message):
    __slots__ = ("number", "name", "endpoints", "public_key", "node", "pid", "device", "cuda_visible_devices", "num_threads", "weights_bytes", "since_epoch", "experts_held")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CUDA_VISIBLE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    SINCE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_HELD_FIELD_NUMBER: _ClassVar[int]
    number: int
    name: str
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    public_key: str
    node: str
    pid: int
    device: str
    cuda_visible_devices: str
    num_threads: int
    weights_bytes: int
    since_epoch: int
    experts_held: int
    def __init__(self, number: _Optional[int] = ..., name: _Optional[str] = ..., endpoints: _Optional[_Iterable[str]] = ..., public_key: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., cuda_visible_devices: _Optional[str] = ..., num_threads: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., since_epoch: _Optional[int] = ..., experts_held: _Optional[int] = ...) -> None: ...
