"""Forward requests and answers as a client sends and receives them, for Client and AsyncClient.

Imported when the first tensor is sent: other calls do not wait for torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch

from moeserve.api.output import ForwardOutput
from moeserve.api.request import RequestOptions
from moeserve.api.tensors import raw
from moeserve.api.wire import WireRequest, WireResponse, check_request, decode_forward_response, encode_forward_request
from moeserve.errors import MoEServeError

if TYPE_CHECKING:
    from moeserve.client.memory import Lent


def make_call(
    hidden_states: torch.Tensor,
    layer: int | str,
    used_token: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    return_routing: bool,
    model: str | None,
    **options: Unpack[RequestOptions],
) -> WireRequest:
    """The request of these arguments of `Client.forward`. Raises InvalidRequest for values that no service accepts."""
    request = WireRequest(hidden_states, layer, used_token, topk_ids, topk_weights, return_routing, model=model or "", **options)
    check_request(request)
    return request


def encode_call(request: WireRequest, lent: Lent | None = None) -> bytes:
    """The bytes of a request, but for those that are written to `lent`. Raises InvalidRequest."""
    if lent is None:
        return encode_forward_request(request)
    lent.rows[:] = raw(request.hidden_states)
    return encode_forward_request(request, lent.shared)


def encode_request(request: WireRequest) -> bytes:
    """The bytes of a request. Raises InvalidRequest as `check_request` does."""
    check_request(request)
    return encode_forward_request(request)


class SentRequest:
    """The requests of a stream: where their answers belong, and the exception that ended the source."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._error: Exception | None = None
        self._is_first = True
        self._reading: asyncio.Task[Any] | None = None

    def encoded(self, requests: Iterable[WireRequest]) -> Iterator[bytes]:
        """Ends instead of raising, because gRPC only logs exceptions of a request iterator."""
        try:
            for request in requests:
                yield self._encode(request)
        except Exception as error:
            self._error = error

    async def encoded_async(self, requests: AsyncIterable[WireRequest]) -> AsyncIterator[bytes]:
        """The same for an asynchronous source, until `stop`."""
        self._reading = asyncio.current_task()
        try:
            async for request in requests:
                yield self._encode(request)
        except Exception as error:
            self._error = error

    def stop(self) -> None:
        """Nothing more is asked of an asynchronous source: when a service has ended the stream, gRPC leaves the task that waits for it."""
        if self._reading is not None:
            self._reading.cancel()

    def raise_error(self) -> None:
        """Call it after the last answer."""
        if self._error is not None:
            raise self._error

    def _encode(self, request: WireRequest) -> bytes:
        data = encode_request(request)
        if self._is_first:
            self.device, self._is_first = request.hidden_states.device, False
        return data


def decode_answer(data: bytes, device: torch.device, lent: Lent | None = None) -> WireResponse:
    """The answer with its tensors on `device`."""
    answer = decode_forward_response(data, None if lent is None else lent.reply)
    if lent is not None and isinstance(answer.result, ForwardOutput):
        # The memory is soon that of the next call.
        answer = replace(answer, result=replace(answer.result, hidden_states=answer.result.hidden_states.clone()))
    if device.type == "cpu" or isinstance(answer.result, MoEServeError):
        return answer
    return replace(answer, result=answer.result.to(device))


def output_of(answer: WireResponse) -> ForwardOutput:
    """The output, or the service's error, raised."""
    if isinstance(answer.result, MoEServeError):
        raise answer.result
    return answer.result
