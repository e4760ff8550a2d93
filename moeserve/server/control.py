"""`moeserve.v1.ControlService`: frontends in other processes follow the controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from moeserve.control.follow import Report
from moeserve.control.frontends import FollowingFrontend, Frontends
from moeserve.errors import ExpertUnavailable, InvalidRequest
from moeserve.loops import to_its_end
from moeserve.server.rpc import Context, Handler
from moeserve.server.security import FrontendTokens
from moeserve.v1 import control_service_pb2 as pb

CONTROL_SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ControlService"].full_name

#: a report is a few short strings, and a count for each expert
_MAX_REPORT_BYTES: Final = 2**24


@dataclass(frozen=True)
class Control:
    """What frontends follow, and the tokens that allow it: see `frontend_tokens`."""

    frontends: Frontends
    tokens: FrontendTokens


class ControlService:
    """Handlers that raise MoEServeError; the `Boundary` around them checks the frontend token."""

    def __init__(self, frontends: Frontends, draining: asyncio.Event) -> None:
        self._frontends = frontends
        self._draining = draining

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers for a server."""
        follow: Handler = grpc.stream_stream_rpc_method_handler(self.follow, response_serializer=pb.FrontendOrder.SerializeToString)
        return grpc.method_handlers_generic_handler(CONTROL_SERVICE_NAME, {"Follow": follow})

    async def follow(self, reports: AsyncIterator[bytes], context: Context) -> None:
        """The stream of one frontend; when this service drains, it ends with UNAVAILABLE."""
        first = await anext(reports, None)
        if first is None:
            return
        member = await self._frontends.join(_report(first))
        tasks = (
            hearing := asyncio.create_task(self._hear(member, reports)),
            telling := asyncio.create_task(_tell(self._frontends.orders(member), context)),
            asyncio.create_task(self._draining.wait()),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if hearing in done:
                if hearing.result():
                    await self._frontends.left(member)
                return
            if telling in done:
                telling.result()
                raise ExpertUnavailable("this frontend has another stream, or has not answered in time")
            raise ExpertUnavailable("the controller is stopping")
        finally:
            self._frontends.leave(member)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hear(self, member: FollowingFrontend, reports: AsyncIterator[bytes]) -> bool:
        """Reads reports. Returns whether the frontend said that it leaves; the stream may also just end."""
        async for message in reports:
            report = _report(message)
            self._frontends.hear(member, report)
            if report.is_leaving:
                return True
        return False


async def _tell(orders: AsyncIterator[Any], context: Context) -> None:
    async for order in orders:
        # gRPC never frees what it needs for a write that is cancelled.
        await to_its_end(context.write(order.to_message()))


def _report(message: bytes) -> Report:
    if len(message) > _MAX_REPORT_BYTES:
        raise InvalidRequest(f"a report of {len(message)} bytes; at most {_MAX_REPORT_BYTES} are allowed")
    try:
        return Report.from_message(pb.FrontendReport.FromString(message))
    except DecodeError:
        raise InvalidRequest("this is not a FrontendReport") from None
