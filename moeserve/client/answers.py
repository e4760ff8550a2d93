"""Requests as they leave a client and answers as they come back: what Client and AsyncClient share.

T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from google.protobuf.message import Message

from moeserve.api.output import ForwardOutput
from moeserve.api.tensors import FLOAT_DTYPES, WIRE_DTYPES, dtype_name
from moeserve.api.wire import WireRequest, WireResponse, decode_forward_response, encode_forward_request
from moeserve.errors import InvalidRequest, MoEServeError
from moeserve.observe.stats import CallCount, Durations, Event, HostShards, HostStats, LayerStats, ServiceStats
from moeserve.v1 import moe_service_pb2 as pb

Record = TypeVar("Record", HostStats, HostShards, Durations, CallCount, Event)


@dataclass(frozen=True)
class LayerInfo:
    """One served MoE layer; dtype is that of its expert weights; capacity_factor None = no capacity limit."""

    index: int
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str
    dtype: str
    capacity_factor: float | None


def encode_request(request: WireRequest) -> bytes:
    """Raises InvalidRequest at once for what no service could take: not tensors, not float, no possible layer."""
    for name in ("hidden_states", "used_token", "topk_ids", "topk_weights", "token_ids"):
        value = getattr(request, name)
        if not isinstance(value, torch.Tensor) and (value is not None or name == "hidden_states"):
            raise InvalidRequest(f"{name} must be a torch.Tensor, got {type(value).__name__}", name)
    if request.hidden_states.dtype not in FLOAT_DTYPES.values():
        raise InvalidRequest(
            f"hidden_states is {dtype_name(request.hidden_states.dtype)}; allowed: {', '.join(FLOAT_DTYPES)}", "hidden_states"
        )
    if not isinstance(request.layer, int | str):
        raise InvalidRequest(f"layer must be a position or a name, got {type(request.layer).__name__}", "layer")
    return encode_forward_request(request)


class SentRequest:
    """The requests of a stream on their way out: where their answers belong, and the exception that ended them."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._error: Exception | None = None
        self._is_first = True

    def encoded(self, requests: Iterable[WireRequest]) -> Iterator[bytes]:
        """Ends instead of raising, because gRPC would only log what a request iterator raises."""
        try:
            for request in requests:
                yield self._encode(request)
        except Exception as error:
            self._error = error

    async def encoded_async(self, requests: AsyncIterable[WireRequest]) -> AsyncIterator[bytes]:
        """The same for an asynchronous source."""
        try:
            async for request in requests:
                yield self._encode(request)
        except Exception as error:
            self._error = error

    def raise_error(self) -> None:
        """To be called after the last answer."""
        if self._error is not None:
            raise self._error

    def _encode(self, request: WireRequest) -> bytes:
        data = encode_request(request)
        if self._is_first:
            self.device, self._is_first = request.hidden_states.device, False
        return data


def decode_answer(data: bytes, device: torch.device) -> WireResponse:
    """The answer with its tensors on `device`."""
    answer = decode_forward_response(data)
    if device.type == "cpu" or isinstance(answer.result, MoEServeError):
        return answer
    moved: dict[str, Any] = {
        field.name: value.to(device)
        for field in fields(answer.result)
        if isinstance(value := getattr(answer.result, field.name), torch.Tensor)
    }
    return replace(answer, result=replace(answer.result, **moved))


def output_of(answer: WireResponse) -> ForwardOutput:
    """The output; raises the error that came instead."""
    if isinstance(answer.result, MoEServeError):
        raise answer.result
    return answer.result


def read_layers(response: pb.ListLayersResponse) -> list[LayerInfo]:
    """In model order."""
    return [
        LayerInfo(
            index=layer.index,
            name=layer.name,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            activation=layer.activation,
            dtype=dtype_name(WIRE_DTYPES[layer.dtype]),
            capacity_factor=layer.capacity_factor if layer.HasField("capacity_factor") else None,
        )
        for layer in response.layers
    ]


def read_stats(response: pb.GetStatsResponse) -> ServiceStats:
    """The snapshot."""
    return ServiceStats(
        epoch=response.epoch,
        layers=[_read_layer_stats(layer) for layer in response.layers],
        hosts=_read_all(HostStats, response.hosts),
        queue_tokens=response.queue_tokens,
        uptime_s=response.uptime_s,
        expert_retries=response.expert_retries,
        requests=_read_all(Durations, response.requests),
        stages=_read_all(Durations, response.stages),
        calls=_read_all(CallCount, response.calls),
        events=_read_all(Event, response.events),
    )


def _read_layer_stats(layer: pb.LayerStats) -> LayerStats:
    return LayerStats(
        name=layer.name,
        tokens=layer.tokens,
        processed=torch.tensor(layer.processed, dtype=torch.int64),
        dropped=torch.tensor(layer.dropped, dtype=torch.int64),
        live_copies=list(layer.live_copies),
        tensor_parallel=layer.tensor_parallel,
        placement=_read_all(HostShards, layer.placement),
    )


def _read_all(record: type[Record], messages: Iterable[Message]) -> list[Record]:
    """A record's fields are called as the message's."""
    names = [field.name for field in fields(record)]
    return [record(**{name: _plain(getattr(message, name)) for name in names}) for message in messages]


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else list(value)
