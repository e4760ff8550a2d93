"""Calls as spans of OpenTelemetry: the call, its stages, the messages to hosts, and the passes there.

Imported only where OpenTelemetry is. Spans are made after a call has ended, from the times that were recorded.
Hosts record no spans: their answers bring the times of their passes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry import trace as otel
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from moeserve.api.call_trace import CallTrace, HostTimes
from moeserve.observe.stats import host_name
from moeserve.server.tracing import Failure

_SERVICE: Final = "moeserve.v1.MoEService"
_W3C: Final = TraceContextTextMapPropagator()


def begin(method: str, metadata: Mapping[str, Any], provider: Any) -> CallSpan | None:
    """The span of a call, below that of its caller; None = the sampler leaves it out. provider: None = the program's."""
    tracer = otel.get_tracer("moeserve", tracer_provider=provider)
    said = {"rpc.system": "grpc", "rpc.service": _SERVICE, "rpc.method": method}
    name, above = f"{_SERVICE}/{method}", _W3C.extract(metadata)
    span = tracer.start_span(name, above, kind=otel.SpanKind.SERVER, attributes=said)
    return CallSpan(tracer, span) if span.is_recording() else None


class CallSpan:
    """A span that has begun."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span
        #: from the monotonic clock to that of the calendar
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def end(self, trace: CallTrace, failure: Failure | None) -> None:
        """Ends it, with all that was recorded below it."""
        span, start = self._span, trace.began
        seen = {"layer": trace.layer, "tokens": trace.tokens, "epoch": trace.epoch, "batch_tokens": trace.batch_tokens}
        span.set_attributes({f"moeserve.{name}": value for name, value in seen.items()})
        span.set_attribute("moeserve.hosts", sorted({host_name(one.host) for one in trace.hosts}))
        span.set_attribute("rpc.grpc.status_code", 0 if failure is None else failure.code.value[0])
        for name, end in trace.marks:
            stage = self._below(span, name, start, end)
            for one in trace.hosts if name == "hosts" else ():
                if start < one.heard <= end:
                    self._host(stage, one)
            start = end
        if failure is not None:
            attributes = {"exception.type": failure.kind, "exception.message": failure.sentence}
            span.add_event("exception", attributes, self._at(trace.ended))
            span.set_status(otel.StatusCode.ERROR, failure.sentence)
        span.end(self._at(trace.ended))

    def _host(self, stage: Any, seen: HostTimes) -> None:
        attributes = {"moeserve.host": host_name(seen.host), "moeserve.rows": seen.rows}
        host = self._below(stage, "host", seen.sent, seen.heard, attributes)
        pass_s = seen.ended - seen.began
        # The clock of another machine says only how long it took.
        began = seen.began if seen.is_same_clock else (seen.sent + seen.heard - pass_s) / 2
        self._below(host, "kernel", began, began + pass_s, attributes)

    def _below(self, parent: Any, name: str, start: float, end: float, attributes: Mapping[str, Any] | None = None) -> Any:
        context = otel.set_span_in_context(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=self._at(start))
        span.end(self._at(end))
        return span

    def _at(self, seconds: float) -> int:
        return self._offset_ns + round(seconds * 1e9)
