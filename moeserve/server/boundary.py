"""The boundary that every call crosses: token, drain, errors -> status, observation.

Handlers behind it return answers or raise MoEServeError. A health check needs no token, is answered while
draining, and is not counted as traffic; its bytes are untrusted, too.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Final, Never

import grpc

from moeserve.errors import ExpertUnavailable, MoEServeError, Overloaded, PermissionDenied, Unauthenticated
from moeserve.files import Rotating
from moeserve.server.answering import answering, as_stream
from moeserve.server.rpc import Behavior, Context, Handler
from moeserve.server.security import Tokens
from moeserve.server.status import as_user_error, to_status
from moeserve.server.tracing import take_note
from moeserve.server.transfers import Transfers

#: method, name of the status code, seconds
Observe = Callable[[str, str, float], None]

#: its service observes every request that it brings, as those of streams do
_MANY: Final = "/moeserve.v1.MoEService/ForwardMany"
_HEALTH: Final = "/grpc.health.v1.Health/"
_ADMIN: Final = "/moeserve.v1.AdminService/"
#: of it, the methods that callers may call too
_PING: Final = "/moeserve.v1.AdminService/Ping"
_CONTROL: Final = "/moeserve.v1.ControlService/"
#: answered while draining, too: they say so
_PROBES: Final = frozenset((_PING, *(f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))))
#: when to try a service again that ends, or is not there yet
RESTART_S: Final = 1.0
#: endless calls, of all callers together: streams in either direction, watching health and following too
MAX_STREAMS: Final = 4096


class Boundary(grpc.aio.ServerInterceptor):
    """One per server. Call `drain()` when no new work may start; `idle()` then waits for running calls.

    A stream that ends well is not observed as a whole: it may last for days, and its service observes every message.
    """

    def __init__(self, tokens: Rotating[Tokens], observe: Observe, transfers: Transfers, max_streams: int = MAX_STREAMS) -> None:
        self.draining = asyncio.Event()
        self._transfers = transfers
        self._tokens = tokens
        self._observe = observe
        self._guarded: dict[str, Handler] = {}
        self._max_streams = max_streams
        self._streams = 0
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """No new work from now on."""
        self.draining.set()
        self._transfers.drain()

    async def idle(self) -> None:
        """Returns once no call is running."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of the call, guarded; for a refused call, a handler that refuses before anything is read."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        take_note(metadata)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        refusal = None if method.startswith(_HEALTH) else self._refusal(method, metadata)
        if refusal is not None:
            return grpc.stream_stream_rpc_method_handler(self._guard(method, _refuse(refusal)))
        if method not in self._guarded:
            self._guarded[method] = as_stream(handler, self._protect(method, handler))
        return self._guarded[method]

    def _protect(self, method: str, handler: Handler) -> Behavior:
        inner, is_stream = answering(method, handler, self._transfers), handler.request_streaming or handler.response_streaming
        return self._guard(method, self._bound(inner) if is_stream else inner, handler.response_streaming or method == _MANY)

    def _refusal(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> MoEServeError | None:
        which, allowed = self._let_in(method)
        is_known = any(_carries(metadata, token) for token in allowed)
        if which == "frontend" and not is_known and not self._tokens.current().lets_any_follow:
            return PermissionDenied(
                "this service does not accept frontends of other users or machines: controller.frontend_token_file is not set"
            )
        if allowed and not is_known:
            return Unauthenticated(f"the {which} token is missing or wrong; send it as metadata: authorization: Bearer TOKEN")
        if self.draining.is_set() and method not in _PROBES:
            return ExpertUnavailable("the service is draining and takes no new requests", RESTART_S)
        return None

    def _let_in(self, method: str) -> tuple[str, Collection[bytes]]:
        """The name of the token for a method, and the valid tokens; none = no token needed."""
        tokens = self._tokens.current()
        if method.startswith(_CONTROL):
            return "frontend", tokens.frontends
        if method == _PING:
            return "bearer", () if tokens.caller is None else (tokens.caller, *filter(None, (tokens.admin,)))
        which, token = ("admin", tokens.admin) if method.startswith(_ADMIN) else ("bearer", tokens.caller)
        return which, () if token is None else (token,)

    def _bound(self, inner: Behavior) -> Behavior:
        async def bounded(request: Any, context: Context) -> Any:
            if self._streams >= self._max_streams:
                raise Overloaded(f"{self._streams} streams are open; allowed: {self._max_streams} of all callers together")
            self._streams += 1
            try:
                return await inner(request, context)
            finally:
                self._streams -= 1

        return bounded

    def _guard(self, method: str, inner: Behavior, observes_itself: bool = False) -> Behavior:
        is_traffic = not method.startswith(_HEALTH)

        async def guarded(request: Any, context: Context) -> Any:
            code, start = grpc.StatusCode.OK, time.perf_counter()
            if is_traffic:
                self._running += 1
                self._idle.clear()
            try:
                return await inner(request, context)
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except (Exception, asyncio.CancelledError) as error:
                if _caller_left(error):
                    code = grpc.StatusCode.CANCELLED
                    raise asyncio.CancelledError from None
                code, status = _told(error, method)
            finally:
                if code is not grpc.StatusCode.OK:
                    self._transfers.arriving.ended(context)
                # Before the status leaves, so a caller with an answer finds it counted.
                if is_traffic:
                    self._end(method, None if observes_itself and code is grpc.StatusCode.OK else code, time.perf_counter() - start)
            del request  # gRPC keeps what aborted a call, with this frame, until the cycles of its references are collected
            return await _abort(context, status)

        return guarded

    def _end(self, method: str, code: grpc.StatusCode | None, seconds: float) -> None:
        if code is not None:
            self._observe(method.rpartition("/")[2], code.name, seconds)
        self._running -= 1
        if not self._running:
            self._idle.set()


async def _abort(context: Context, status: grpc.Status) -> Never:
    if (left_s := context.time_remaining()) is not None and left_s <= 0:
        raise asyncio.CancelledError  # nobody would get the status, and gRPC never frees what it could not send
    try:
        await context.abort_with_status(status)
    except grpc.aio.InternalError:
        # The caller left, or its deadline passed, while the answer was sent.
        raise asyncio.CancelledError from None
    raise AssertionError("abort does not return")


def _refuse(error: MoEServeError) -> Behavior:
    async def refuse(_request: Any, _context: Context) -> Never:
        raise error

    return refuse


def _told(error: BaseException, method: str) -> tuple[grpc.StatusCode, grpc.Status]:
    """The status for the caller. The error is not kept: it refers to the frame that keeps it, and so to the message."""
    known = as_user_error(error, method)
    return known.code, to_status(known)


def _caller_left(error: BaseException) -> bool:
    """Whether the caller is gone: gRPC could not read or write, or the call was cancelled from outside.

    A CancelledError from something that it awaited is a bug of ours.
    """
    if isinstance(error, grpc.aio.InternalError):
        return True
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _carries(metadata: Iterable[tuple[str, str | bytes]], token: bytes) -> bool:
    for key, value in metadata:
        if key == "authorization":
            scheme, _, given = (value if isinstance(value, str) else value.decode("latin-1")).partition(" ")
            return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token)
    return False
