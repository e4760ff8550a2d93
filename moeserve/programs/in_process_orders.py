"""Orders of a controller in this process, passed on as objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moeserve.control.follow import Order, Report
from moeserve.control.frontends import FollowingFrontend, Frontends
from moeserve.errors import ServiceUnreachable


class InProcessOrders:
    """Orders from `frontends`."""

    controller = None

    def __init__(self, frontends: Frontends) -> None:
        self.frontends = frontends

    @asynccontextmanager
    async def follow(self) -> AsyncIterator[_Stream]:
        """One attempt; the stream ends when the controller removes this frontend."""
        stream = _Stream(self.frontends)
        try:
            yield stream
        finally:
            stream.close()


class _Stream:
    def __init__(self, frontends: Frontends) -> None:
        self._frontends = frontends
        self._member: asyncio.Future[FollowingFrontend] = asyncio.get_running_loop().create_future()
        self._orders: AsyncIterator[Order] | None = None

    async def write(self, report: Report) -> None:
        if not self._member.done():
            self._member.set_result(await self._frontends.join(report))
        elif report.is_leaving:
            await self._frontends.left(self._member.result())
        else:
            self._frontends.hear(self._member.result(), report)

    async def read(self) -> Order:
        self._orders = self._orders or self._frontends.orders(await self._member)
        async for order in self._orders:
            return order
        raise ServiceUnreachable("the controller in this process closed the stream of this frontend")

    def close(self) -> None:
        if self._member.done():
            self._frontends.leave(self._member.result())
