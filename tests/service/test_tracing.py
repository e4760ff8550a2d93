"""Calls as traces of OpenTelemetry, from the client to the kernels of hosts: in the exporter of this program, and at a collector."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from concurrent import futures
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import grpc
import pytest
import torch
from opentelemetry import trace as otel
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collected
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collecting
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from moeserve import AsyncClient, Client
from moeserve.api.wire import WireRequest
from moeserve.config import load_config
from moeserve.errors import ConfigError, InvalidRequest
from tests.support.harness import Kind, ServiceHarness
from tests.support.waiting import until

CONFIG = {
    "layers": [{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "gating": {"top_k": 4}}],
    "placement": {"num_hosts": 2},
}
FORWARD, STREAM = "moeserve.v1.MoEService/Forward", "moeserve.v1.MoEService/ForwardStream"
STAGES = ["decode", "queue", "route", "plan", "write", "doorbell", "hosts", "combine", "other", "encode"]
X = torch.ones(3, 16)


@pytest.fixture(scope="module")
def memory() -> Iterator[InMemorySpanExporter]:
    """Of the provider of this program: OpenTelemetry takes only one for a process."""
    provider, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    otel.set_tracer_provider(provider)
    yield exporter
    exporter.shutdown()  # not the provider, which would warn of every call of later tests


@pytest.fixture
def exporter(memory: InMemorySpanExporter) -> InMemorySpanExporter:
    memory.clear()
    return memory


@pytest.fixture(scope="module", params=["shm", "tcp"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceHarness]:
    kind: Kind = request.param
    with ServiceHarness(CONFIG, kind, tmp_path_factory.mktemp("s")) as harness:
        yield harness


def ended(exporter: InMemorySpanExporter, kind: SpanKind, number: int = 1) -> list[ReadableSpan]:
    """The spans of that kind, as soon as there are so many."""

    def there() -> list[ReadableSpan]:
        return [span for span in exporter.get_finished_spans() if span.kind is kind]

    until(lambda: len(there()) >= number)
    return there()


def below(exporter: InMemorySpanExporter, parent: ReadableSpan) -> list[ReadableSpan]:
    spans = [span for span in exporter.get_finished_spans() if span.parent is not None and span.parent.span_id == parent.context.span_id]
    return sorted(spans, key=lambda span: span.start_time or 0)


def lies_in(span: ReadableSpan, other: ReadableSpan) -> bool:
    # The clock of the calendar is set from time to time; a millisecond is allowed between two processes' views of it.
    assert span.start_time and span.end_time and other.start_time and other.end_time
    return other.start_time - 10**6 <= span.start_time <= span.end_time <= other.end_time + 10**6


def test_one_trace_from_the_client_to_the_kernels_of_hosts(service: ServiceHarness, exporter: InMemorySpanExporter) -> None:
    with Client(service.target) as client, otel.get_tracer("test").start_as_current_span("step") as step:
        client.forward(X)
    (server,), (caller,) = ended(exporter, SpanKind.SERVER), ended(exporter, SpanKind.CLIENT)
    assert caller.parent.span_id == step.get_span_context().span_id and server.parent.span_id == caller.context.span_id
    assert {span.context.trace_id for span in exporter.get_finished_spans()} == {step.get_span_context().trace_id}
    assert (caller.name, server.name) == (FORWARD, FORWARD) and lies_in(server, caller)
    assert {name: value for name, value in (server.attributes or {}).items() if name.startswith("moeserve")} == {
        "moeserve.layer": "layers.0",
        "moeserve.tokens": 3,
        "moeserve.batch_tokens": 3,
        "moeserve.epoch": 1,
        "moeserve.hosts": ("host-0", "host-1"),
    }
    assert server.attributes["rpc.grpc.status_code"] == 0 and server.status.status_code is StatusCode.UNSET
    stages = below(exporter, server)
    assert [stage.name for stage in stages] == STAGES and all(lies_in(stage, server) for stage in stages)
    assert all(one.end_time == after.start_time for one, after in pairwise(stages))
    hosts = below(exporter, stages[STAGES.index("hosts")])
    assert [(host.name, host.attributes["moeserve.rows"]) for host in hosts] == [("host", 3)] * 2
    assert {host.attributes["moeserve.host"] for host in hosts} == {"host-0", "host-1"}
    for host in hosts:
        (kernel,) = below(exporter, host)
        assert kernel.name == "kernel" and lies_in(kernel, host) and kernel.end_time > kernel.start_time


def test_without_a_trace_the_client_sends_none(service: ServiceHarness, exporter: InMemorySpanExporter) -> None:
    with Client(service.target) as client:
        client.forward(X)
    (server,) = ended(exporter, SpanKind.SERVER)
    assert server.parent is None and not [span for span in exporter.get_finished_spans() if span.kind is SpanKind.CLIENT]


def test_asyncio_and_streams(service: ServiceHarness, exporter: InMemorySpanExporter) -> None:
    async def call() -> None:
        async with AsyncClient(service.target) as client:
            await asyncio.gather(*(client.forward(X) for _ in range(3)))
            async for _ in client.forward_stream([WireRequest(X, request_id=str(number)) for number in range(2)]):
                pass

    with otel.get_tracer("test").start_as_current_span("step") as step:
        asyncio.run(call())
    servers, callers = ended(exporter, SpanKind.SERVER, 5), ended(exporter, SpanKind.CLIENT, 3)
    one = step.get_span_context()
    assert {span.context.trace_id for span in (*servers, *callers)} == {one.trace_id}
    parents = sorted(span.parent.span_id for span in servers)
    assert parents == sorted([*(span.context.span_id for span in callers), one.span_id, one.span_id])
    assert sorted(span.name for span in servers) == [FORWARD] * 3 + [STREAM] * 2


def test_errors_are_recorded_on_both_sides(service: ServiceHarness, exporter: InMemorySpanExporter) -> None:
    with Client(service.target) as client, otel.get_tracer("test").start_as_current_span("step"), pytest.raises(InvalidRequest):
        client.forward(torch.ones(3, 8))
    (server,), (caller,) = ended(exporter, SpanKind.SERVER), ended(exporter, SpanKind.CLIENT)
    for span in (server, caller):
        assert span.status.status_code is StatusCode.ERROR and "layers.0 takes [tokens, 16]" in (span.status.description or "")
        (event,) = span.events
        assert event.name == "exception" and "InvalidRequest" in event.attributes["exception.type"]
    assert server.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.parametrize(
    "parent", ["", "nonsense", "00-0-0-00", "ff-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"]
)
def test_a_context_that_is_none_begins_a_trace(service: ServiceHarness, exporter: InMemorySpanExporter, parent: str) -> None:
    from moeserve.client.answers import encode_request

    with grpc.insecure_channel(service.target) as channel:
        channel.unary_unary(f"/{FORWARD}")(encode_request(WireRequest(X)), metadata=(("traceparent", parent),), timeout=30)
    (server,) = ended(exporter, SpanKind.SERVER)
    assert server.parent is None


def test_a_caller_that_does_not_sample_is_not_recorded(service: ServiceHarness, exporter: InMemorySpanExporter) -> None:
    from moeserve.client.answers import encode_request

    message = encode_request(WireRequest(X))
    with grpc.insecure_channel(service.target) as channel:
        for flags in ("00", "01"):
            parent = f"00-{'1' * 32}-{'2' * 16}-{flags}"
            channel.unary_unary(f"/{FORWARD}")(message, metadata=(("traceparent", parent),), timeout=30)
    (server,) = ended(exporter, SpanKind.SERVER)
    assert server.parent.span_id == int("2" * 16, 16)


class Collector(collecting.TraceServiceServicer):
    """Of OTLP: what is exported arrives in `spans`, with the name of the service."""

    def __init__(self) -> None:
        self.spans: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def Export(self, request: Any, context: Any) -> Any:
        for of_resource in request.resource_spans:
            name = next(one.value.string_value for one in of_resource.resource.attributes if one.key == "service.name")
            for scope in of_resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((name, span))
        return collected.ExportTraceServiceResponse()

    def all(self) -> Sequence[tuple[str, Any]]:
        found = []
        try:
            while True:
                found.append(self.spans.get_nowait())
        except Empty:
            return found


def test_spans_reach_a_collector_at_the_latest_when_the_service_ends(tmp_path: Path) -> None:
    server, collector = grpc.server(futures.ThreadPoolExecutor(1)), Collector()
    collecting.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        config = {**CONFIG, "observability": {"otlp_endpoint": f"http://127.0.0.1:{port}"}}
        with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
            client.forward(X)
    finally:
        server.stop(None)
    spans = collector.all()
    assert {name for name, _ in spans} == {"moeserve"}
    assert {*STAGES, FORWARD, "host", "kernel"} == {span.name for _, span in spans}


def test_without_the_exporter_the_service_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    config = {**CONFIG, "observability": {"otlp_endpoint": "http://127.0.0.1:4317"}}
    told = r"observability\.otlp_endpoint is http://127.0.0.1:4317; it needs OpenTelemetry: pip install 'moeserve\[otel\]'"
    with pytest.raises(ConfigError, match=told), ServiceHarness(config, "local", tmp_path):
        pass


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4317", "ftp://host", "http://", "http://host/path?x", "http://a b"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        load_config({**CONFIG, "observability": {"otlp_endpoint": endpoint}})
