"""Forward messages <-> bytes in the protobuf wire format, without handing tensor data to protobuf.

protobuf copies a large `bytes` field about as slowly as a socket moves it. Here decoding a large message cuts `Tensor.data` out of the
message as a view and lets protobuf parse the few bytes that remain; encoding writes fields in the order of their numbers, runs of small
ones by protobuf, and in front of the data of a large tensor the bytes that protobuf would write there. The bytes on the wire are those of
protobuf's own serializer: every field at most once, as parsers need it that do not merge the pieces of a message field (protobuf.js).
What is received may be in pieces and in any order, as the format allows.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

import grpc
import torch
from google.protobuf.message import DecodeError, Message

from moeserve.api.call_trace import CallTrace
from moeserve.api.fields import DATA_KEY, SHARED, SMALL_TENSOR_BYTES, split
from moeserve.api.find_layer import check_layer
from moeserve.api.output import ForwardOutput
from moeserve.api.protobuf import MAX_SMALL_BYTES, tag, varint
from moeserve.api.request import BatchStart, LayerRequest, RequestFields
from moeserve.api.tensors import FLOAT_DTYPES, WIRE_DTYPES, WIRE_NUMBERS, dtype_name, raw, require_data, small_copy, view
from moeserve.errors import FieldViolation, InvalidRequest, MoEServeError, from_status
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

M = TypeVar("M", bound=Message)

_MAX_DIMS: Final = 8

#: fields that may be absent without being tensors
_OPTIONAL: Final = [one.name for one in pb.ForwardRequest.DESCRIPTOR.fields if one.has_presence and one.message_type is None]
#: where hidden_states are that have this dtype and shape -> their bytes; raises InvalidRequest
Find = Callable[[pb.SharedBlock, tensor_pb2.Tensor], memoryview]
_STATUS_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}

_TENSOR_FIELDS: Final[Mapping[type[Message], Mapping[int, str]]] = {
    kind: {field.number: field.name for field in kind.DESCRIPTOR.fields if field.message_type is tensor_pb2.Tensor.DESCRIPTOR}
    for kind in (pb.ForwardRequest, pb.ForwardResponse)
}
#: tensors of a request, by name
REQUEST_TENSORS: Final = tuple(_TENSOR_FIELDS[pb.ForwardRequest].values())
# Every field in the order in which it is sent, and the key of those that are tensors.
_KEYS: Final[Mapping[type[Message], Mapping[str, bytes | None]]] = {
    kind: {name: tag(number) if number in tensors else None for number, name in sorted((f.number, f.name) for f in kind.DESCRIPTOR.fields)}
    for kind, tensors in _TENSOR_FIELDS.items()
}


@dataclass(frozen=True)
class WireRequest(RequestFields):
    """One forward request as a client sends it; tensors as in `LayerRequest`.

    `request_id` comes back unchanged; `model` "" = the one the service serves; `layer` None = the client named none.
    """

    hidden_states: torch.Tensor
    layer: int | str | None = 0
    used_token: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    return_routing: bool = False
    request_id: str = ""
    model: str = ""

    def for_layer(
        self, deadline: float | None, caller: str, begun: BatchStart | None = None, trace: CallTrace | None = None
    ) -> LayerRequest:
        """The request without its address: the layer and the model."""
        of_layer = {name: getattr(self, name) for name in _OF_LAYER}
        return LayerRequest(deadline=deadline, caller=caller, begun=begun, trace=trace, **of_layer)


_OF_LAYER: Final = sorted({one.name for one in fields(LayerRequest)} & {one.name for one in fields(WireRequest)})


@dataclass(frozen=True)
class WireResponse:
    """The answer to the request of the same `request_id`: the output, or the error."""

    request_id: str
    result: ForwardOutput | MoEServeError


def check_request(request: WireRequest) -> None:
    """Raises InvalidRequest at once for values that no service accepts: no dense tensor, not float, an invalid layer."""
    if not isinstance(request, WireRequest):
        raise InvalidRequest(f"a request must be a WireRequest, got {type(request).__name__}")
    for name in REQUEST_TENSORS:
        value = getattr(request, name)
        if not isinstance(value, torch.Tensor) and (value is not None or name == "hidden_states"):
            raise InvalidRequest(f"{name} must be a torch.Tensor, got {type(value).__name__}", name)
        if value is not None:
            require_data(value, name)
    if request.hidden_states.dtype not in FLOAT_DTYPES.values():
        raise InvalidRequest(
            f"hidden_states is {dtype_name(request.hidden_states.dtype)}; allowed: {', '.join(FLOAT_DTYPES)}", "hidden_states"
        )
    check_layer(request.layer)


def encode_forward_request(request: WireRequest, shared: pb.SharedBlock | None = None) -> bytes:
    """A `moeserve.v1.ForwardRequest`; `shared`: where the bytes of hidden_states have been written.

    Raises InvalidRequest for a dtype or a value the wire does not know, or a negative layer.
    """
    stated, layer, weights = dict(vars(request)), request.layer, request.topk_weights
    if layer is not None:
        check_layer(layer)
        stated["layer_name" if isinstance(layer, str) else "layer_index"] = layer
    if weights is not None and weights.is_floating_point():
        stated["topk_weights"] = weights.float()
    if shared is not None:
        stated["shared"] = shared
    return _encode(pb.ForwardRequest, stated)


def decode_forward_request(data: bytes, find: Find | None = None) -> WireRequest:
    """The request in `data`; its tensors are read-only views of `data`, or of what `find` returns.

    Raises InvalidRequest for anything else.
    """
    small, found = _parse(pb.ForwardRequest, data)
    if small.HasField("shared"):
        if find is None:
            raise InvalidRequest("shared memory is not offered here", SHARED)
        found[pb.ForwardRequest.HIDDEN_STATES_FIELD_NUMBER] = find(small.shared, small.hidden_states)
    tensors = _tensors(small, found)
    if "hidden_states" not in tensors:
        raise InvalidRequest("hidden_states is missing", "hidden_states")
    optional: dict[str, Any] = {**tensors, **{name: getattr(small, name) for name in _OPTIONAL if small.HasField(name)}}
    layer = optional.pop("layer_index", optional.pop("layer_name", None))
    return WireRequest(layer=layer, return_routing=small.return_routing, request_id=small.request_id, model=small.model, **optional)


def request_id_of(data: bytes) -> str:
    """The request_id of a request that may be wrong in every other way; "" when it is unreadable."""
    try:
        return _parse(pb.ForwardRequest, data)[0].request_id
    except InvalidRequest:
        return ""


def encode_forward_response(request_id: str, result: ForwardOutput | MoEServeError, reply: memoryview | None = None) -> bytes:
    """A `moeserve.v1.ForwardResponse`; with `reply`, the bytes of its hidden_states are written there."""
    if isinstance(result, MoEServeError):
        retry_after_ms = 0 if result.retry_after_s is None else max(1, round(1000 * result.retry_after_s))
        found = result.violations if isinstance(result, InvalidRequest) else ()
        violations = [pb.FieldViolation(field=one.field, description=one.description) for one in found]
        error = pb.Error(code=result.code.value[0], message=str(result), retry_after_ms=retry_after_ms, violations=violations)
        return pb.ForwardResponse(request_id=request_id, error=error).SerializeToString()
    if reply is not None:
        rows = raw(result.hidden_states)
        assert len(rows) == len(reply), "an answer has the dtype and shape of its request"
        reply[:] = rows
    return _encode(pb.ForwardResponse, {"request_id": request_id, **vars(result), "is_shared": reply is not None or None})


def decode_forward_response(data: bytes, reply: memoryview | None = None) -> WireResponse:
    """The answer in `data`; its tensors are views of `data`, or of `reply`, where the answer may lie.

    Raises MoEServeError when `data` is not an answer.
    """
    try:
        small, found = _parse(pb.ForwardResponse, data)
        if small.is_shared:
            if reply is None:
                raise InvalidRequest("it lies in memory that was not offered")
            found[pb.ForwardResponse.HIDDEN_STATES_FIELD_NUMBER] = reply
        tensors = _tensors(small, found)
        if small.HasField("error"):
            told = from_status(_STATUS_BY_NUMBER.get(small.error.code, grpc.StatusCode.UNKNOWN), small.error.message)
            told.retry_after_s = small.error.retry_after_ms / 1000 or None
            if isinstance(told, InvalidRequest):
                told.violations = tuple(FieldViolation(one.field, one.description) for one in small.error.violations)
            return WireResponse(small.request_id, told)
        missing = {"hidden_states", "requested", "processed", "dropped", "dropped_tokens"} - tensors.keys()
        if missing:
            raise InvalidRequest(f"it has no {', '.join(sorted(missing))}")
    except InvalidRequest as error:
        raise MoEServeError(f"the server's answer cannot be read: {error}") from None
    return WireResponse(
        small.request_id, ForwardOutput(aux_loss=small.aux_loss, z_loss=small.z_loss, model_revision=small.model_revision or 1, **tensors)
    )


def _encode(kind: type[Message], stated: Mapping[str, Any]) -> bytes:
    """A message of these fields, by name; None = absent, and names that the message does not have are left out."""
    parts: list[bytes | memoryview] = []
    small = kind()
    is_elsewhere = stated.get("shared") or stated.get("is_shared")
    for name, key in _KEYS[kind].items():
        value = stated.get(name)
        if value is None:
            continue
        if key is None:
            try:
                if isinstance(value, Message):
                    getattr(small, name).CopyFrom(value)
                else:
                    setattr(small, name, value)
            except (TypeError, ValueError, OverflowError):
                raise InvalidRequest(f"{name} is {_shown(value)}, which cannot be sent", name) from None
            continue
        dtype = WIRE_NUMBERS.get(value.dtype)
        if dtype is None:
            raise InvalidRequest(f"{name} is {dtype_name(value.dtype)}, which cannot be sent", name)
        is_here = not (name == "hidden_states" and is_elsewhere)
        is_large = is_here and value.nbytes > SMALL_TENSOR_BYTES
        tensor = tensor_pb2.Tensor() if is_large else getattr(small, name)
        tensor.dtype = dtype
        tensor.shape.extend(value.shape)
        if not is_large:
            tensor.data = small_copy(value) if is_here else b""
            continue
        data = raw(value)
        head = tensor.SerializeToString() + DATA_KEY + varint(len(data))
        parts += (small.SerializeToString(), key, varint(len(head) + len(data)), head, data)
        small = kind()
    parts.append(small.SerializeToString())
    return b"".join(parts)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "a number of too many digits"


def _tensors(small: Message, data: Mapping[int, memoryview]) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, name in _TENSOR_FIELDS[type(small)].items():
        if small.HasField(name):
            stated = getattr(small, name)
            tensors[name] = _tensor(stated, data.get(number, stated.data), name)
    return tensors


def _parse(kind: type[M], message: bytes) -> tuple[M, dict[int, memoryview]]:
    # A small message is copied sooner than it is split.
    small_bytes, data = (message, {}) if len(message) <= MAX_SMALL_BYTES else split(message, _TENSOR_FIELDS[kind])
    try:
        return kind.FromString(small_bytes), data
    except DecodeError as error:
        raise InvalidRequest(f"not a {kind.DESCRIPTOR.full_name} message: {error}") from None


def _tensor(stated: tensor_pb2.Tensor, data: bytes | memoryview, name: str) -> torch.Tensor:
    dtype, shape = WIRE_DTYPES.get(stated.dtype), list(stated.shape)
    if dtype is None:
        raise InvalidRequest(f"{name} has dtype number {stated.dtype}; allowed: {', '.join(map(dtype_name, WIRE_NUMBERS))}", name)
    if len(shape) > _MAX_DIMS:
        raise InvalidRequest(f"{name} has {len(shape)} dimensions; at most {_MAX_DIMS} are allowed", name)
    return view(data, shape, dtype, name)
