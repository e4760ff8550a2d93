"""Orders of a controller in another process, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from moeserve.addresses import parse_target
from moeserve.client import TLS, ControlClient
from moeserve.client.control import FollowStream
from moeserve.control.follow import Order, Report


class GrpcOrders:
    """Orders of the controller at "host:port". `token` is a token, or a function called at each attempt. Raises ConfigError."""

    def __init__(self, controller: str, token: str | Callable[[], str], tls: TLS | bool | None = None) -> None:
        self.controller = parse_target(controller, "controller")
        self._client = ControlClient(controller, token, tls)

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[_Stream]:
        """One attempt, on a connection of its own."""
        async with self._client.follow() as stream:
            yield _Stream(stream)


class _Stream:
    def __init__(self, stream: FollowStream) -> None:
        self._stream = stream

    async def write(self, report: Report) -> None:
        await self._stream.write(report.to_message())

    async def read(self) -> Order:
        return Order.from_message(await self._stream.read())
