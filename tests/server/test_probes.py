"""The port for probes: health in plain text and nothing else, with TLS on the other one."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve.config import ServerConfig
from moeserve.errors import ConfigError
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.health import LIVENESS
from tests.support.certificates import Authority
from tests.support.engine import echo_engine
from tests.support.messages import request
from tests.support.servers import Running, run
from tests.support.waiting import until_async

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def check(channel: grpc.aio.Channel, service: str) -> int:
    return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))).status


async def started(tmp_path: Path) -> Running:
    authority = Authority(tmp_path, "ours")
    cert, key = authority.sign("localhost")
    running = await run(health_port=0, tls_cert=cert, tls_key=key, client_ca=authority.certificate)
    await running.channel.close()
    return running


async def test_a_process_without_experts_lives_and_is_not_ready(tmp_path: Path) -> None:
    running = await started(tmp_path)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.health_port}") as channel:
        assert (await check(channel, ""), await check(channel, LIVENESS)) == (NOT_SERVING, SERVING)
        for layer in range(2):
            running.server.set_serving(layer, True)
        assert (await check(channel, ""), await check(channel, LIVENESS)) == (SERVING, SERVING)
        running.server.set_serving(0, False)
        assert (await check(channel, ""), await check(channel, LIVENESS)) == (NOT_SERVING, SERVING)
    await running.server.stop()


async def test_it_answers_nothing_else_and_is_not_counted(tmp_path: Path) -> None:
    running = await started(tmp_path)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.health_port}") as channel:
        for method in ("/moeserve.v1.MoEService/ListLayers", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):  # said by gRPC, before anybody has to make room for it
            await check(channel, "x" * 2**21)
    assert running.observed == []
    await running.server.stop()


async def test_it_says_not_serving_while_the_service_drains() -> None:
    running = await run(health_port=0)
    running.engine.gate.clear()
    finishing = asyncio.ensure_future(running.stub.Forward(request()))
    await until_async(lambda: running.engine.requests)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.server.health_port}") as channel:
        draining = asyncio.create_task(running.server.drain(10))
        await health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest())
        assert (await check(channel, ""), await check(channel, LIVENESS)) == (NOT_SERVING, NOT_SERVING)
        running.engine.gate.set()
        await finishing
        await draining
        with pytest.raises(grpc.aio.AioRpcError):
            await check(channel, LIVENESS)
    await running.channel.close()


async def test_its_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = GrpcServer(ServerConfig(port=0, health_port=port), lambda method, code, seconds: None, engine=echo_engine())
        with pytest.raises(ConfigError, match=rf"server\.health_port: cannot listen on 127\.0\.0\.1:{port}"):
            await server.start()
        await server.stop()


async def test_there_is_none_unless_asked_for() -> None:
    running = await run()
    assert running.server.health_port is None
    await running.channel.close()
    await running.server.stop()
