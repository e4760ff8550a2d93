"""Calls as spans of OpenTelemetry, in programs that trace: W3C Trace Context travels in the metadata of the call.

A program that traces has imported OpenTelemetry; this module never does so first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from moeserve.client.connection import SERVICE_NAME, Reach

Metadata = tuple[tuple[str, str], ...]


def call_span(method: str, reach: Reach) -> AbstractContextManager[Metadata]:
    """`with` gives the metadata of a call, which is a span if a trace is active here."""
    return _span(method, reach) if _is_tracing() else nullcontext(reach.metadata)


def metadata_of(reach: Reach) -> Metadata:
    """The metadata of a call without a span of its own: those of the messages of a stream are the service's."""
    return reach.metadata + _carried() if _is_tracing() else reach.metadata


def _is_tracing() -> bool:
    otel: Any = sys.modules.get("opentelemetry.trace")
    return otel is not None and otel.get_current_span().get_span_context().is_valid


@contextmanager
def _span(method: str, reach: Reach) -> Iterator[Metadata]:
    from opentelemetry import trace as otel  # noqa: PLC0415

    said = {"rpc.system": "grpc", "rpc.service": SERVICE_NAME, "rpc.method": method, "server.address": reach.target}
    tracer = otel.get_tracer("moeserve")
    with tracer.start_as_current_span(f"{SERVICE_NAME}/{method}", kind=otel.SpanKind.CLIENT, attributes=said):
        yield reach.metadata + _carried()


def _carried() -> Metadata:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
