"""Following a controller: one stream of messages, whatever they mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc

from moeserve.client.connection import TLS, call_metadata, channel_credentials
from moeserve.client.failures import to_error
from moeserve.errors import MoEServeError, PermissionDenied, ServiceUnreachable
from moeserve.v1 import control_service_pb2 as pb
from moeserve.v1 import control_service_pb2_grpc as pb_grpc

#: the placement of the largest models takes some hundred KB
_MAX_ORDER_BYTES: Final = 64 * 2**20
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_ORDER_BYTES),
    # Notices a controller whose machine vanished, even after days without a word.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class ControlClient:
    """The ControlService at `target` ("host:port"), with a frontend token, or what says it at each attempt; tls as for `Client`.

    Raises ConfigError naming a file that cannot be read.
    """

    def __init__(self, target: str, token: str | Callable[[], str], tls: TLS | bool | None = None) -> None:
        self._target = target
        self._token = token
        self._tls = tls
        channel_credentials(tls)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[FollowStream]:
        """One attempt, on a connection of its own: a name may stand for another machine by now."""
        credentials, token = channel_credentials(self._tls), self._token if isinstance(self._token, str) else self._token()
        if credentials is None:
            channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        else:
            channel = grpc.aio.secure_channel(self._target, credentials, options=_OPTIONS)
        async with channel:
            call = pb_grpc.ControlServiceStub(channel).Follow(metadata=call_metadata(token))  # type: ignore[no-untyped-call]
            try:
                yield FollowStream(call, self._target)
            finally:
                call.cancel()


class FollowStream:
    """Reports out, orders in."""

    def __init__(self, call: Any, target: str) -> None:
        self._call, self._target = call, target

    async def write(self, report: pb.FrontendReport) -> None:
        """What the frontend says of itself now; when the stream has ended, `read` says so."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(report)

    async def read(self) -> pb.FrontendOrder:
        """The next order, once there is one. Raises the MoEServeError that ended the stream."""
        try:
            order: Any = await self._call.read()
        except grpc.RpcError as failure:
            raise self._error(failure) from None
        if order is grpc.aio.EOF:
            raise ServiceUnreachable(f"{self._target} ended the stream")
        return order  # type: ignore[no-any-return]

    def _error(self, failure: grpc.RpcError) -> MoEServeError:
        if isinstance(failure, grpc.aio.AioRpcError) and failure.code() is grpc.StatusCode.UNIMPLEMENTED:
            return PermissionDenied(
                f"{self._target} lets no frontend follow: it is no controller, or has no controller.frontend_token_file"
            )
        return to_error(failure, self._target, 0.0)
