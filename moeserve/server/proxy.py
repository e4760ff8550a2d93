"""Calls of administrators and followers that reach a process without a controller: passed on, as they are, to the one that has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from moeserve.errors import ExpertUnavailable
from moeserve.loops import to_its_end
from moeserve.server.rpc import Context, Handler
from moeserve.server.security import FrontendTokens
from moeserve.v1 import admin_service_pb2 as admin_pb
from moeserve.v1 import control_service_pb2 as control_pb

_SERVICES: Final = (admin_pb.DESCRIPTOR.services_by_name["AdminService"], control_pb.DESCRIPTOR.services_by_name["ControlService"])
#: every process answers Ping for itself. Other names are made up by callers, and whatever is kept or counted by method would grow
_METHODS: Final = {f"/{one.full_name}/{method.name}": method for one in _SERVICES for method in one.methods if method.name != "Ping"}
#: the other process bounds what it says and hears
_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@dataclass(frozen=True)
class SharedPort:
    """The port of this process is also that of another, which listens at `controller`, host:port, for what only it can answer.

    tokens: of the frontends that may follow it.
    """

    controller: str
    tokens: FrontendTokens = field(default_factory=FrontendTokens)


class Proxy(grpc.GenericRpcHandler):
    """Handlers for the methods of AdminService and ControlService but Ping. Tokens are checked here, and by the other process again."""

    def __init__(self, shared: SharedPort, draining: asyncio.Event) -> None:
        self._target, self._draining = shared.controller, draining
        self._channel: grpc.aio.Channel | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """As gRPC wants it."""
        method = handler_call_details.method
        if method not in _METHODS:
            return None

        async def pass_on(messages: AsyncIterator[bytes], context: Context) -> None:
            await self._pass_on(method, messages, context, context.write)

        async def pass_one_on(messages: AsyncIterator[bytes], context: Context) -> bytes:
            answers: list[bytes] = []

            async def keep(answer: bytes) -> None:
                answers.append(answer)

            await self._pass_on(method, messages, context, keep)
            return answers[0]

        if _METHODS[method].server_streaming:
            return grpc.stream_stream_rpc_method_handler(pass_on)
        return grpc.stream_unary_rpc_method_handler(pass_one_on)

    async def _pass_on(
        self, method: str, messages: AsyncIterator[bytes], context: Context, write: Callable[[bytes], Coroutine[Any, Any, None]]
    ) -> None:
        """The messages of the call; its answers, each to be written by `write`; and how it ended, where that is an error."""
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._target, options=_OPTIONS)
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if key == "authorization"]
        call: Any = self._channel.stream_stream(method)(timeout=context.time_remaining(), metadata=metadata)
        asking = asyncio.create_task(_ask(call, messages))
        ending = asyncio.create_task(self._draining.wait())
        ending.add_done_callback(lambda done: done.cancelled() or call.cancel())
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                await to_its_end(write(answer))
            code, details, trailing = await call.code(), await call.details(), await call.trailing_metadata()
        except grpc.aio.AioRpcError as error:
            code, details, trailing = error.code(), error.details(), error.trailing_metadata()
        except asyncio.CancelledError:
            if not self._draining.is_set():
                raise
            raise ExpertUnavailable("this process is stopping") from None
        finally:
            asking.cancel()
            ending.cancel()
            call.cancel()
        if code is not grpc.StatusCode.OK:
            await context.abort(code, details or "", tuple(trailing or ()))


async def _ask(call: Any, messages: AsyncIterator[bytes]) -> None:
    with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):  # how it ended is found where answers are read
        async for message in messages:
            await call.write(message)
        await call.done_writing()
