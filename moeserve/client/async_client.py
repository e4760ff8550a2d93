"""The client for asyncio: `Client` with `await`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from grpc_health.v1 import health_pb2

from moeserve.client.connection import CALLING, TLS, Reach
from moeserve.client.line import LoopLines
from moeserve.client.retries import Retries
from moeserve.client.spans import Metadata, call_span, metadata_of
from moeserve.client.stubs import ServiceStubs
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, MoEServeError
from moeserve.observe.records import read
from moeserve.observe.stats import LayerInfo, ServiceStats
from moeserve.v1 import moe_service_pb2 as pb

if TYPE_CHECKING:
    import torch

    from moeserve.api.output import ForwardOutput
    from moeserve.api.request import RequestOptions
    from moeserve.api.wire import WireRequest, WireResponse


class AsyncClient:
    """A service at `target` ("host:port", or a target of gRPC): one connection per event loop.

    Arguments, methods and errors are those of `Client`. Cancelling a call cancels the work in the service.
    """

    def __init__(
        self, target: str, token: str | None = None, tls: TLS | bool | None = None, timeout: float | None = 30.0, *, retry: bool = True
    ) -> None:
        self._lines = LoopLines(Reach(target, token, tls, timeout, CALLING), ServiceStubs)
        self._retry = retry

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
        **options: Unpack[RequestOptions],
    ) -> ForwardOutput:
        """As `Client.forward`."""
        from moeserve.client import answers  # noqa: PLC0415

        routing = used_token, topk_ids, topk_weights, return_routing
        with call_span("Forward", self._lines.reach) as metadata:
            data = await self._forward(answers.encode_call(hidden_states, layer, *routing, model, **options), timeout, metadata)
            return answers.output_of(answers.decode_answer(data, hidden_states.device))

    async def forward_stream(
        self, requests: Iterable[WireRequest] | AsyncIterable[WireRequest], timeout: float | None = None
    ) -> AsyncIterator[WireResponse]:
        """As `Client.forward_stream`; `requests` is consumed while answers are read."""
        from moeserve.client.answers import SentRequest, decode_answer  # noqa: PLC0415

        sent = SentRequest()
        outgoing = sent.encoded_async(requests) if isinstance(requests, AsyncIterable) else sent.encoded(requests)
        with self._lines.here.call(timeout) as call:
            answers = call.stubs.forward_stream(outgoing, timeout=call.timeout_s, metadata=metadata_of(self._lines.reach))
            try:
                async for data in answers:
                    yield decode_answer(data, sent.device)
            finally:
                answers.cancel()
        sent.raise_error()

    async def layers(self, timeout: float | None = None) -> list[LayerInfo]:
        """As `Client.layers`."""
        return [read(LayerInfo, layer) for layer in (await self._call("list_layers", pb.ListLayersRequest(), timeout)).layers]

    async def stats(self, timeout: float | None = None) -> ServiceStats:
        """As `Client.stats`."""
        return read(ServiceStats, await self._call("get_stats", pb.GetStatsRequest(), timeout))

    async def ready(self, timeout: float | None = None) -> bool:
        """As `Client.ready`."""
        try:
            answer = await self._call("check_health", health_pb2.HealthCheckRequest(), timeout)
        except (ExpertUnavailable, DeadlineExceeded):
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Closes the connection of the running event loop, and cancels its calls."""
        channel = self._lines.here.close()
        if channel is not None:
            await channel.close()

    async def _forward(self, message: bytes, timeout: float | None, metadata: Metadata) -> bytes:
        now = time.monotonic()
        retries = Retries(self._lines.here.timeout_s(timeout), now)
        while True:
            try:
                return await self._call("forward", message, retries.left_s(now), metadata)  # type: ignore[no-any-return]
            except MoEServeError as error:
                if not self._retry or (pause_s := retries.pause_s(error, time.monotonic())) is None:
                    raise
            await asyncio.sleep(pause_s)
            now = time.monotonic()

    async def _call(self, method: str, message: Any, timeout: float | None, metadata: Metadata | None = None) -> Any:
        with self._lines.here.call(timeout) as call:
            return await getattr(call.stubs, method)(message, timeout=call.timeout_s, metadata=metadata or self._lines.reach.metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
