"""Who wants to know where the time of a call goes, and how it is told.

A caller asks with the metadata `moeserve-timing: 1` and finds the answer in the trailing metadata of the same name, a few hundred bytes of
JSON whatever it sends. Clients that do not know of it are told nothing. For OpenTelemetry, a call is a span of the trace that its metadata
name (W3C Trace Context), if this process records spans: for a collector of its own, or because its program has set a provider.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple

import grpc

from moeserve.api.call_trace import TIMING_KEY, CallTrace
from moeserve.errors import MoEServeError
from moeserve.server.rpc import Context

Metadata = Mapping[str, str | bytes]
_KEYS: Final = frozenset({TIMING_KEY, "traceparent", "tracestate"})
#: of those, what the call that this task answers has sent
_TOLD: Final[ContextVar[Metadata]] = ContextVar("_TOLD", default=MappingProxyType({}))


def take_note(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Of a call that begins. gRPC has its metadata at hand only then; later it copies them once more."""
    for key, _ in metadata:
        if key in _KEYS:
            _TOLD.set({key: value for key, value in metadata if key in _KEYS})
            return


class Failure(NamedTuple):
    """Why a call has no answer. Not the error itself: it refers to the frames of the call, and so to its tensors."""

    code: grpc.StatusCode
    kind: str
    sentence: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """What may be told of an error."""
        if isinstance(error, MoEServeError):
            return cls(error.code, type(error).__name__, str(error))
        is_cancelled = isinstance(error, asyncio.CancelledError)
        return cls(grpc.StatusCode.CANCELLED if is_cancelled else grpc.StatusCode.UNKNOWN, type(error).__name__, "")


class Tracing:
    """Of one server. `provider` records its spans; None = the one of the program, if it has one."""

    def __init__(self) -> None:
        self.provider: Any = None

    def begin(self, method: str, context: Context) -> Traced | None:
        """A call whose message is here; None = nobody wants to know."""
        told = _TOLD.get()
        span = self._span(method, told) if self.provider is not None or "opentelemetry.sdk.trace" in sys.modules else None
        return Traced(context, span, TIMING_KEY in told) if TIMING_KEY in told or span is not None else None

    def close(self) -> None:
        """Sends the spans that a collector has not got yet, if it takes them now."""
        provider, self.provider = self.provider, None
        if provider is not None:
            provider.shutdown()

    def _span(self, method: str, told: Metadata) -> Any:
        from moeserve.server import spans  # noqa: PLC0415 - OpenTelemetry is not installed everywhere

        return spans.begin(method, told, self.provider)


class Traced:
    """`with` gives the trace of a call, to be recorded while it runs, and tells it at the end."""

    def __init__(self, context: Context, span: Any, is_asked: bool) -> None:
        self._context, self._span, self._is_asked = context, span, is_asked
        self._trace = CallTrace()

    def __enter__(self) -> CallTrace:
        return self._trace

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._trace.end()
        if self._is_asked and error is None:
            self._context.set_trailing_metadata(((TIMING_KEY, self._trace.report()),))
        if self._span is not None:
            # After the answer has left.
            failure = None if error is None else Failure.of(error)
            asyncio.get_running_loop().call_soon(self._span.end, self._trace, failure)
