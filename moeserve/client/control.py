"""The client's end of following: one stream of messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc

from moeserve.client.connection import FOLLOWING, TLS, Reach
from moeserve.client.failures import to_error
from moeserve.client.fork import FORKS
from moeserve.errors import MoEServeError, PermissionDenied, ServiceUnreachable
from moeserve.loops import in_thread
from moeserve.v1 import control_service_pb2 as pb
from moeserve.v1 import control_service_pb2_grpc as pb_grpc

#: for a call that was given up to end
_END_S: Final = 1.0


class ControlClient:
    """The ControlService at `target` ("host:port"). The token may be a function that is called at each attempt; tls as for `Client`.

    It never uses a proxy.

    Raises ConfigError naming the invalid argument, or the file that cannot be read.
    """

    def __init__(self, target: str, token: str | Callable[[], str], tls: TLS | bool | None = None) -> None:
        self._target, self._token, self._tls = target, token, tls
        self._reach()

    def _reach(self) -> Reach:
        token = self._token() if callable(self._token) else self._token
        return Reach(self._target, token, self._tls, None, FOLLOWING)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[FollowStream]:
        """One attempt, on a new connection: the name may have another address by now."""
        reach = await in_thread(self._reach)  # to find the token may take a second, in which calls are answered
        FORKS.check(is_async=True)
        async with reach.open_async() as channel:
            FORKS.opened(channel, is_async=True)
            call = pb_grpc.ControlServiceStub(channel).Follow(metadata=reach.metadata)  # type: ignore[no-untyped-call]
            stream = FollowStream(call, reach.target)
            try:
                yield stream
            finally:
                await stream.end()


class FollowStream:
    """Reports out, orders in."""

    def __init__(self, call: Any, target: str) -> None:
        self._call, self._target = call, target
        self._reading: asyncio.Future[Any] | None = None

    async def write(self, report: pb.FrontendReport) -> None:
        """Sends a report; if the stream has ended, `read` raises the error."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.write(report)

    async def read(self) -> pb.FrontendOrder:
        """Waits for the next order. Raises the MoEServeError that ended the stream."""
        try:
            # Whoever waits may be cancelled; gRPC goes on reading until the call ends.
            self._reading = asyncio.create_task(self._call.read())
            order: Any = await asyncio.shield(self._reading)
        except grpc.RpcError as failure:
            raise self._error(failure) from None
        if order is grpc.aio.EOF:
            raise ServiceUnreachable(f"{self._target} ended the stream")
        return order  # type: ignore[no-any-return]

    async def end(self) -> None:
        """Ends the call. What gRPC says of it comes while this event loop still runs: others complain about one that is closed."""
        self._call.cancel()
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=_END_S)

    def _error(self, failure: grpc.RpcError) -> MoEServeError:
        if isinstance(failure, grpc.aio.AioRpcError) and failure.code() is grpc.StatusCode.UNIMPLEMENTED:
            return PermissionDenied(
                f"{self._target} does not accept frontends: it is not a controller, or controller.frontend_token_file is not set"
            )
        return to_error(failure, self._target, None)
