"""Where spans go: to a collector that speaks OTLP over gRPC."""

from __future__ import annotations

from typing import Any

from moeserve.errors import ConfigError


def exporting_to(endpoint: str) -> Any:
    """A provider of tracers whose spans are sent to `endpoint` in the background, https:// with TLS, anything else without.

    Its name is that of OTEL_SERVICE_NAME, else moeserve; OpenTelemetry reads further variables itself: sampler, headers, batches.
    Raises ConfigError when OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise ConfigError(f"observability.otlp_endpoint is {endpoint}; it needs OpenTelemetry: pip install 'moeserve[otel]'") from None
    named = Resource({"service.name": "moeserve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create().merge(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"))))
    return provider
