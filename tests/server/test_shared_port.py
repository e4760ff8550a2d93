"""Several servers on one port: who may join, and what reaches the one with the controller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from moeserve import ConfigError
from moeserve.config import ServerConfig
from moeserve.observe.status import ServiceStatus
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.proxy import SharedPort
from moeserve.v1 import admin_service_pb2 as pb
from moeserve.v1 import admin_service_pb2_grpc as pb_grpc
from tests.support.engine import echo_engine
from tests.support.servers import Observed

TOKEN = "of-the-administrator"


class Refusing:
    """A controller that knows no host by name."""

    audit = None

    def status(self) -> ServiceStatus:
        raise ConfigError("nothing is served yet")

    async def drain(self, host: str) -> None:
        raise ConfigError(f"there is no host {host}")

    async def scale(self, num_hosts: int) -> SimpleNamespace:
        return SimpleNamespace(epoch=7, host_names=[f"host-{number}" for number in range(num_hosts)])


def server(config: ServerConfig, **more: object) -> GrpcServer:
    return GrpcServer(config, lambda method, code, seconds: None, **more)


@pytest.fixture
def observed() -> Observed:
    """The calls that reach a server beside the one that has the controller."""
    return Observed()


@pytest.fixture
async def port(tmp_path: Path, observed: Observed) -> AsyncIterator[int]:
    """Of a server without an administrator of its own, beside one that has it."""
    (tmp_path / "token").write_text(TOKEN)
    one = ServerConfig(port=0, processes=2, admin_token_file=tmp_path / "token")
    controller = server(one.model_copy(update={"processes": 1}), admin=Refusing())
    first = server(one, engine=echo_engine())
    port = await first.start()
    joining = one.model_copy(update={"port": port})
    shared = SharedPort(f"127.0.0.1:{await controller.start()}")
    second = GrpcServer(joining, observed.observe, engine=echo_engine(), shared=shared)
    assert await second.start() == port
    await first.stop()  # from here on every connection reaches the other
    yield port
    await second.stop()
    await controller.stop()


async def test_a_second_service_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="Address already in use"):
        await server(ServerConfig(port=port, processes=2), engine=echo_engine()).start()
    with pytest.raises(ConfigError, match="Address already in use"):
        await server(ServerConfig(port=port), engine=echo_engine()).start()


@pytest.mark.parametrize("service", ["AdminService", "ControlService"])
async def test_names_that_callers_make_up_are_no_methods(service: str, observed: Observed) -> None:
    """Of an administrator without a token, too: nothing is kept or counted of them."""
    joined = GrpcServer(ServerConfig(port=0, processes=2), observed.observe, engine=echo_engine(), shared=SharedPort("127.0.0.1:1"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{await joined.start()}") as channel:
        for number in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/moeserve.v1.{service}/Made{number}")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await joined.stop()
    assert observed == []


async def test_what_is_passed_on_is_counted_where_it_arrived(port: int, observed: Observed) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub, metadata = pb_grpc.AdminServiceStub(channel), [("authorization", f"Bearer {TOKEN}")]
        scaled = await stub.Scale(pb.ScaleRequest(hosts=2), metadata=metadata)
        assert (scaled.epoch, scaled.hosts) == (7, ["host-0", "host-1"])
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.DrainHost(pb.DrainHostRequest(host="host-7"), metadata=metadata)
    assert await observed.until(2) == [("Scale", "OK"), ("DrainHost", "FAILED_PRECONDITION")]


async def test_what_only_the_controller_knows_is_asked_of_it(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DrainHost(pb.DrainHostRequest(host="host-7"), metadata=[("authorization", f"Bearer {TOKEN}")])
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "there is no host host-7")
        assert any(key == "grpc-status-details-bin" for key, _ in caught.value.trailing_metadata())
        for metadata in ([], [("authorization", "Bearer wrong")]):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DrainHost(pb.DrainHostRequest(host="host-7"), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await stub.Ping(pb.PingRequest())).role == "frontend"
