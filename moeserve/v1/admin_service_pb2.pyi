from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SwapExpertsRequest(_message.Message):
    __slots__ = ("layer", "checkpoint", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    checkpoint: str
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[str] = ..., checkpoint: _Optional[str] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

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
    __slots__ = ("epoch", "is_changing", "wanted_hosts", "shortage", "hosts", "frontends", "layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IS_CHANGING_FIELD_NUMBER: _ClassVar[int]
    WANTED_HOSTS_FIELD_NUMBER: _ClassVar[int]
    SHORTAGE_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    is_changing: bool
    wanted_hosts: str
    shortage: str
    hosts: _containers.RepeatedCompositeFieldContainer[PlacedHost]
    frontends: _containers.RepeatedCompositeFieldContainer[FollowingFrontend]
    layers: _containers.RepeatedCompositeFieldContainer[PlacedLayer]
    def __init__(self, epoch: _Optional[int] = ..., is_changing: _Optional[bool] = ..., wanted_hosts: _Optional[str] = ..., shortage: _Optional[str] = ..., hosts: _Optional[_Iterable[_Union[PlacedHost, _Mapping]]] = ..., frontends: _Optional[_Iterable[_Union[FollowingFrontend, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[PlacedLayer, _Mapping]]] = ...) -> None: ...

class PlacedHost(_message.Message):
    __slots__ = ("name", "node", "is_up", "pid", "device", "cuda_visible_devices", "weights_bytes", "number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    IS_UP_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CUDA_VISIBLE_DEVICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    node: str
    is_up: bool
    pid: int
    device: str
    cuda_visible_devices: str
    weights_bytes: int
    number: int
    def __init__(self, name: _Optional[str] = ..., node: _Optional[str] = ..., is_up: _Optional[bool] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., cuda_visible_devices: _Optional[str] = ..., weights_bytes: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("name", "model_revision", "tensor_parallel", "placement")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_revision: int
    tensor_parallel: int
    placement: _containers.RepeatedCompositeFieldContainer[PlacedExperts]
    def __init__(self, name: _Optional[str] = ..., model_revision: _Optional[int] = ..., tensor_parallel: _Optional[int] = ..., placement: _Optional[_Iterable[_Union[PlacedExperts, _Mapping]]] = ...) -> None: ...

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
