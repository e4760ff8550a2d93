"""Forward messages <-> bytes in the protobuf wire format, without handing tensor data to protobuf.

protobuf copies a large `bytes` field about as slowly as a socket moves it. Here decoding a large message cuts `Tensor.data` out of the
message as a view and lets protobuf parse the few bytes that remain; encoding writes fields in the order of their numbers, runs of small
ones by protobuf, and in front of the data of a large tensor the bytes that protobuf would write there. The bytes on the wire are those of
protobuf's own serializer: every field at most once, as parsers need it that do not merge the pieces of a message field (protobuf.js).
What is received may be in pieces and in any order, as the format allows.

T tokens, H hidden size, K choices per token.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

import grpc
import torch
from google.protobuf.message import DecodeError, Message

from moeserve.api.call_trace import CallTrace
from moeserve.api.output import ForwardOutput
from moeserve.api.protobuf import LENGTH, MAX_SMALL_BYTES, scan, tag, varint
from moeserve.api.request import BatchStart, LayerRequest, RequestFields
from moeserve.api.tensors import WIRE_DTYPES, WIRE_NUMBERS, dtype_name, raw, view
from moeserve.errors import InvalidRequest, MoEServeError, from_status
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2

M = TypeVar("M", bound=Message)

_MAX_DIMS: Final = 8
# Up to here protobuf's copies cost less than doing without them, and a tensor that is kept does not keep its whole message.
_SMALL_TENSOR_BYTES: Final = 8 * 1024

_DATA_KEY: Final = tag(tensor_pb2.Tensor.DATA_FIELD_NUMBER)
#: fields that may be absent without being tensors
_OPTIONAL: Final = [one.name for one in pb.ForwardRequest.DESCRIPTOR.fields if one.has_presence and one.message_type is None]
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


def encode_forward_request(request: WireRequest) -> bytes:
    """A `moeserve.v1.ForwardRequest`. Raises InvalidRequest for a dtype or a value the wire does not know, or a negative layer."""
    stated, layer, weights = dict(vars(request)), request.layer, request.topk_weights
    if isinstance(layer, int) and not 0 <= layer < 2**32:
        raise InvalidRequest(f"layer is {layer}; layers count from 0", "layer")
    if layer is not None:
        stated["layer_name" if isinstance(layer, str) else "layer_index"] = layer
    if weights is not None and weights.is_floating_point():
        stated["topk_weights"] = weights.float()
    return _encode(pb.ForwardRequest, stated)


def decode_forward_request(data: bytes) -> WireRequest:
    """The request in `data`; its tensors are read-only views of `data`. Raises InvalidRequest for anything else."""
    small, tensors = _decode(pb.ForwardRequest, data)
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


def encode_forward_response(request_id: str, result: ForwardOutput | MoEServeError) -> bytes:
    """A `moeserve.v1.ForwardResponse`."""
    if isinstance(result, MoEServeError):
        retry_after_ms = 0 if result.retry_after_s is None else max(1, round(1000 * result.retry_after_s))
        error = pb.Error(code=result.code.value[0], message=str(result), retry_after_ms=retry_after_ms)
        return pb.ForwardResponse(request_id=request_id, error=error).SerializeToString()
    return _encode(pb.ForwardResponse, {"request_id": request_id, **vars(result)})


def decode_forward_response(data: bytes) -> WireResponse:
    """The answer in `data`; its tensors are views of `data`. Raises MoEServeError when `data` is not an answer."""
    try:
        small, tensors = _decode(pb.ForwardResponse, data)
        if small.HasField("error"):
            told = from_status(_STATUS_BY_NUMBER.get(small.error.code, grpc.StatusCode.UNKNOWN), small.error.message)
            told.retry_after_s = small.error.retry_after_ms / 1000 or None
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
    for name, key in _KEYS[kind].items():
        value = stated.get(name)
        if value is None:
            continue
        if key is None:
            try:
                setattr(small, name, value)
            except (TypeError, ValueError):
                raise InvalidRequest(f"{name} is {value!r}, which cannot be sent", name) from None
            continue
        dtype = WIRE_NUMBERS.get(value.dtype)
        if dtype is None:
            raise InvalidRequest(f"{name} is {dtype_name(value.dtype)}, which cannot be sent", name)
        data = raw(value)
        is_large = len(data) > _SMALL_TENSOR_BYTES
        tensor = tensor_pb2.Tensor() if is_large else getattr(small, name)
        tensor.dtype = dtype
        tensor.shape.extend(value.shape)
        if not is_large:
            tensor.data = data.tobytes()
            continue
        head = tensor.SerializeToString() + _DATA_KEY + varint(len(data))
        parts += (small.SerializeToString(), key, varint(len(head) + len(data)), head, data)
        small = kind()
    parts.append(small.SerializeToString())
    return b"".join(parts)


def _decode(kind: type[M], message: bytes) -> tuple[M, dict[str, torch.Tensor]]:
    small, data = _parse(kind, message)
    tensors = {}
    for number, name in _TENSOR_FIELDS[kind].items():
        if small.HasField(name):
            stated = getattr(small, name)
            tensors[name] = _tensor(stated, data.get(number, stated.data), name)
    return small, tensors


def _parse(kind: type[M], message: bytes) -> tuple[M, dict[int, memoryview]]:
    # A small message is copied sooner than it is split.
    small_bytes, data = (message, {}) if len(message) <= MAX_SMALL_BYTES else _split(message, _TENSOR_FIELDS[kind])
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


def _split(message: bytes, tensor_fields: Container[int]) -> tuple[bytes, dict[int, memoryview]]:
    """The message without the data of its large tensors, and that data by field number (the last one of several)."""
    whole = memoryview(message)
    small: list[bytes | memoryview] = []
    data: dict[int, memoryview] = {}
    for key, start, body, end in scan(message, 0, len(message)):
        number = key >> 3
        if key & 7 != LENGTH or number not in tensor_fields:
            small.append(whole[start:end])
            continue
        rest: list[memoryview] = []
        for inner_key, inner_start, inner_body, inner_end in scan(message, body, end):
            is_data = inner_key == _DATA_KEY[0]
            if is_data and inner_end - inner_body > _SMALL_TENSOR_BYTES:
                data[number] = whole[inner_body:inner_end]
                continue
            if is_data:
                data.pop(number, None)
            rest.append(whole[inner_start:inner_end])
        small += (tag(number), varint(sum(map(len, rest))), *rest)
    if sum(map(len, small)) > MAX_SMALL_BYTES:
        raise InvalidRequest(f"the message has more than {MAX_SMALL_BYTES} bytes beside tensor data")
    return b"".join(small), data
