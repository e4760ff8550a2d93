"""The client for asyncio: `Client` with `await`."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve.client.answers import LayerInfo, Sent, decode_answer, encode_request, output_of, read_layers, read_stats
from moeserve.client.connection import CHANNEL_OPTIONS, SERVICE_NAME, TLS, call_metadata, channel_credentials
from moeserve.client.failures import to_error
from moeserve.errors import DeadlineExceeded, ExpertUnavailable
from moeserve.output import ForwardOutput
from moeserve.stats import ServiceStats
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from moeserve.wire import WireRequest, WireResponse


class AsyncClient:
    """One connection to a service at `target` ("host:port"), for the event loop it is first used in.

    Arguments, methods and errors are those of `Client`. Cancelling a call cancels the work in the service.
    """

    def __init__(self, target: str, token: str | None = None, tls: TLS | bool | None = None, timeout: float = 30.0) -> None:
        self._target = target
        self._timeout_s = timeout
        self._metadata = call_metadata(token)
        self._credentials = channel_credentials(tls)

    async def forward(
        self,
        hidden_states: torch.Tensor,
        layer: int | str = 0,
        used_token: torch.Tensor | None = None,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        return_routing: bool = False,
        model: str | None = None,
        timeout: float | None = None,
        *,
        token_ids: torch.Tensor | None = None,
        capacity_factor: float | None = None,
        noise: str | None = None,
        seed: int | None = None,
    ) -> ForwardOutput:
        """As `Client.forward`."""
        request = WireRequest(
            hidden_states,
            layer,
            used_token,
            topk_ids,
            topk_weights,
            return_routing,
            model=model or "",
            token_ids=token_ids,
            capacity_factor=capacity_factor,
            noise=noise,
            seed=seed,
        )
        data = await self._call(self._forward, encode_request(request), timeout)
        return output_of(decode_answer(data, hidden_states.device))

    async def forward_stream(
        self, requests: Iterable[WireRequest] | AsyncIterable[WireRequest], timeout: float | None = None
    ) -> AsyncIterator[WireResponse]:
        """As `Client.forward_stream`; `requests` is consumed while answers are read."""
        timeout_s = self._timeout_s if timeout is None else timeout
        sent = Sent()
        outgoing = sent.encoded_async(requests) if isinstance(requests, AsyncIterable) else sent.encoded(requests)
        call = self._forward_stream(outgoing, timeout=timeout_s, metadata=self._metadata)
        try:
            async for data in call:
                yield decode_answer(data, sent.device)
        except grpc.RpcError as failure:
            raise to_error(failure, self._target, timeout_s) from None
        finally:
            call.cancel()
        sent.raise_error()

    async def layers(self, timeout: float | None = None) -> list[LayerInfo]:
        """As `Client.layers`."""
        return read_layers(await self._call(self._service.ListLayers, pb.ListLayersRequest(), timeout))

    async def stats(self, timeout: float | None = None) -> ServiceStats:
        """As `Client.stats`."""
        return read_stats(await self._call(self._service.GetStats, pb.GetStatsRequest(), timeout))

    async def ready(self, timeout: float | None = None) -> bool:
        """As `Client.ready`."""
        try:
            answer = await self._call(self._health.Check, health_pb2.HealthCheckRequest(), timeout)
        except (ExpertUnavailable, DeadlineExceeded):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Ends the connection and cancels the calls still running."""
        await self._channel.close()

    async def _call(self, method: Callable[..., Any], message: Any, timeout: float | None) -> Any:
        timeout_s = self._timeout_s if timeout is None else timeout
        try:
            return await method(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure, self._target, timeout_s) from None

    # Made on first use: a channel belongs to the event loop that runs when it is made.
    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self._target, self._credentials, options=CHANNEL_OPTIONS)

    @cached_property
    def _forward(self) -> Any:
        return self._channel.unary_unary(f"/{SERVICE_NAME}/Forward")

    @cached_property
    def _forward_stream(self) -> Any:
        return self._channel.stream_stream(f"/{SERVICE_NAME}/ForwardStream")

    @cached_property
    def _service(self) -> Any:
        return pb_grpc.MoEServiceStub(self._channel)  # type: ignore[no-untyped-call]

    @cached_property
    def _health(self) -> Any:
        return health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
