"""The client for asyncio: `Client` with `await`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from grpc_health.v1 import health_pb2

from moeserve.client.connection import CALLING, TLS, Reach
from moeserve.client.line import LoopLines
from moeserve.client.memory import CallerMemory, Lent
from moeserve.client.retries import Retries
from moeserve.client.spans import Metadata, call_span, metadata_of
from moeserve.client.stubs import ServiceStubs
from moeserve.client.together import Together
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, MoEServeError, NotOffered
from moeserve.observe.records import read
from moeserve.observe.stats import LayerInfo, ServiceStats
from moeserve.v1 import moe_service_pb2 as pb

if TYPE_CHECKING:
    import torch

    from moeserve.api.output import ForwardOutput
    from moeserve.api.request import RequestOptions
    from moeserve.api.wire import WireRequest, WireResponse

log = logging.getLogger(__name__)


class AsyncClient:
    """A service at `target` ("host:port", or a target of gRPC): one connection per event loop.

    Arguments, methods and errors are those of `Client`. Cancelling a call cancels the work in the service. Any number of calls may be in
    progress; small ones that start together travel in one message, and the work of one of them ends early only when all are cancelled.
    """

    def __init__(
        self, target: str, token: str | None = None, tls: TLS | bool | None = None, timeout: float | None = 30.0, *, retry: bool = True
    ) -> None:
        self._lines = LoopLines(Reach(target, token, tls, timeout, CALLING), ServiceStubs)
        self._retry = retry
        self._together = Together()
        self._memory = CallerMemory(self._lines.reach.target)

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
        request, now = answers.make_call(hidden_states, layer, *routing, model, **options), time.monotonic()
        retries = Retries(self._lines.here.timeout_s(timeout), now)
        if self._memory.is_wanted(hidden_states):
            await self._open_memory(retries)
            now = time.monotonic()
        with call_span("Forward", self._lines.reach) as metadata:
            lent = self._memory.lend(hidden_states)
            if lent is not None:
                try:
                    return await self._answer(request, retries, now, metadata, lent)
                except BaseException as error:
                    if not self._memory.lost(lent, error):
                        raise
                now = time.monotonic()
            return await self._answer(request, retries, now, metadata)

    async def _open_memory(self, retries: Retries) -> None:
        try:
            name = (await self._within("open_memory", pb.OpenMemoryRequest(), retries.left_s(time.monotonic()))).socket
        except NotOffered as error:
            self._memory.refuse(str(error))
        except MoEServeError as error:
            log.debug("large tensors travel in messages for now: %s", error)
        else:
            await asyncio.to_thread(self._memory.open, name, retries.left_s(time.monotonic()))

    async def _answer(
        self, request: WireRequest, retries: Retries, now: float, metadata: Metadata, lent: Lent | None = None
    ) -> ForwardOutput:
        """now: when its time has begun, or later: calls that begin together have the same time left, and travel together."""
        from moeserve.client import answers  # noqa: PLC0415

        message, device = answers.encode_call(request, lent), request.hidden_states.device
        while True:
            try:
                data = await self._send(message, request.layer, retries.left_s(now), metadata)
                return answers.output_of(answers.decode_answer(data, device, lent))
            except MoEServeError as error:
                pause_s = retries.pause_s(error, time.monotonic(), is_known=self._lines.here.is_known) if self._retry else None
                if pause_s is None:
                    raise retries.ended(error) from None
            await asyncio.sleep(pause_s)
            now = time.monotonic()

    async def _send(self, message: bytes, layer: int | str | None, timeout_s: float | None, metadata: Metadata) -> bytes:
        """A call that is a span goes alone: several in one message would have only one."""
        if metadata != self._lines.reach.metadata:
            return await self._within("forward", message, timeout_s, metadata)  # type: ignore[no-any-return]
        return await self._together.call(self._within, message, layer, timeout_s)

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
                sent.stop()
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
        self._memory.close()
        channel = self._lines.here.close()
        if channel is not None:
            await channel.close()

    async def _call(self, method: str, message: Any, timeout: float | None) -> Any:
        return await self._within(method, message, self._lines.here.timeout_s(timeout))

    async def _within(self, method: str, message: Any, timeout_s: float | None, metadata: Metadata | None = None) -> Any:
        """timeout_s: None = without limit."""
        with self._lines.here.within(timeout_s) as call:
            return await getattr(call.stubs, method)(message, timeout=call.timeout_s, metadata=metadata or self._lines.reach.metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
