"""Starting, health, draining, stopping."""

from __future__ import annotations

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.server.grpc_server import GrpcServer
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.engine import echo_engine
from tests.support.messages import request
from tests.support.servers import Running, run
from tests.support.waiting import until_async

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "moeserve.v1.MoEService", "model.layers.3.mlp", "model.layers.5.mlp")


async def health(running: Running) -> tuple[int, ...]:
    stub = health_pb2_grpc.HealthStub(running.channel)
    return tuple([(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in NAMES])


async def test_health_is_per_layer_and_whole_when_every_layer_is(running: Running) -> None:
    assert await health(running) == (NOT_SERVING,) * 4
    running.server.set_serving(1, True)
    assert await health(running) == (NOT_SERVING, NOT_SERVING, NOT_SERVING, SERVING)
    running.server.set_serving(0, True)
    assert await health(running) == (SERVING,) * 4
    running.server.set_serving(1, False)
    assert await health(running) == (NOT_SERVING, NOT_SERVING, SERVING, NOT_SERVING)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert running.observed == []


async def test_watchers_are_told(running: Running) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == NOT_SERVING
    for layer in range(2):
        running.server.set_serving(layer, True)
    assert (await watch.read()).status == SERVING
    await running.server.drain(5)
    assert (await watch.read()).status == NOT_SERVING


async def test_reflection_names_the_services(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    (answer,) = [answer async for answer in call]
    assert {service.name for service in answer.list_services_response.service} == {
        "inference.GRPCInferenceService",
        "moeserve.v1.MoEService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_draining_finishes_what_runs_and_refuses_the_rest(running: Running) -> None:
    running.engine.gate.clear()
    finishing = asyncio.ensure_future(running.stub.Forward(request(request_id="running")))
    await until_async(lambda: running.engine.requests)
    draining = asyncio.create_task(running.server.drain(10))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.Forward(request())
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "the service is draining and takes no new requests",
    )
    assert await health(running) == (NOT_SERVING,) * 4
    running.server.set_serving(0, True)
    assert await health(running) == (NOT_SERVING,) * 4
    assert not draining.done()
    running.engine.gate.set()
    assert (await finishing).request_id == "running"
    await draining
    assert running.observed == [("Forward", "UNAVAILABLE"), ("Forward", "OK")]
    with pytest.raises(grpc.aio.AioRpcError):
        await running.stub.ListLayers(pb.ListLayersRequest())


async def test_draining_gives_up_after_its_time(running: Running) -> None:
    running.engine.gate.clear()
    endless = asyncio.ensure_future(running.stub.Forward(request()))
    await until_async(lambda: running.engine.requests)
    await running.server.drain(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await endless
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await until_async(lambda: running.engine.cancelled == 1)


async def test_stopping_twice_or_before_starting_is_nothing_special() -> None:
    server = GrpcServer(ServerConfig(port=0), lambda method, code, seconds: None, engine=echo_engine())
    await server.stop()
    started = await run()
    await started.channel.close()
    await started.server.drain(1)
    await started.server.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_in_use_is_named(running: Running, host: str) -> None:
    second = GrpcServer(ServerConfig(host=host, port=running.port), lambda method, code, seconds: None, engine=echo_engine())
    with pytest.raises(ConfigError, match=f"{host}:{running.port}"):
        await second.start()


async def test_the_ipv6_loopback_is_an_address_too() -> None:
    server = GrpcServer(ServerConfig(host="::1", port=0), lambda method, code, seconds: None, engine=echo_engine())
    try:
        port = await server.start()
    except ConfigError as error:
        pytest.skip(str(error))
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
        await channel.unary_unary("/moeserve.v1.MoEService/ListLayers")(b"")
    await server.stop()


class SilentCollector:
    """In place of what sends spans: it waits for a collector that takes nothing."""

    def __init__(self) -> None:
        self.answered, self.is_waited_for = threading.Event(), False

    def shutdown(self) -> None:
        self.is_waited_for = True
        self.answered.wait()


async def test_a_collector_of_spans_that_does_not_answer_holds_up_no_end() -> None:
    running, collector = await run(), SilentCollector()
    running.server._service.tracing.provider = collector
    try:
        async with asyncio.timeout(30):
            await running.stop()
        await until_async(lambda: collector.is_waited_for)
    finally:
        collector.answered.set()
