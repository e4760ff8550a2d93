"""Following a controller: one stream of messages, whatever they mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from moeserve.client.connection import FOLLOWING, TLS, Reach
from moeserve.client.failures import to_error
from moeserve.errors import MoEServeError, PermissionDenied, ServiceUnreachable
from moeserve.v1 import control_service_pb2 as pb
from moeserve.v1 import control_service_pb2_grpc as pb_grpc


class ControlClient:
    """The ControlService at `target` ("host:port"), with a frontend token, or what says it at each attempt; tls as for `Client`.

    It never asks a proxy.

    Raises ConfigError naming the argument that cannot be, or the file that cannot be read.
    """

    def __init__(self, target: str, token: str | Callable[[], str], tls: TLS | bool | None = None) -> None:
        self._target, self._token, self._tls = target, token, tls
        self._reach()

    def _reach(self) -> Reach:
        token = self._token() if callable(self._token) else self._token
        return Reach(self._target, token, self._tls, None, FOLLOWING)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[FollowStream]:
        """One attempt, on a connection of its own: a name may stand for another machine by now."""
        reach = self._reach()
        async with reach.open_async() as channel:
            call = pb_grpc.ControlServiceStub(channel).Follow(metadata=reach.metadata)  # type: ignore[no-untyped-call]
            try:
                yield FollowStream(call, reach.target)
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
        return to_error(failure, self._target, None)
