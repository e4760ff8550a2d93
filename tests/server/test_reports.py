"""Frontends follow for weeks, and report once a second: their reports take no room once they were heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from moeserve.config import FrontendConfig, ServerConfig, load_config
from moeserve.control.follow import Report
from moeserve.control.frontends import Frontends
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.proxy import SharedPort
from moeserve.server.security import FrontendTokens
from tests.support.engine import echo_engine
from tests.support.two_layers import CONFIG
from tests.support.waiting import until_async

TOKENS = FrontendTokens(own=frozenset({b"follow"}))
MIB = 2**20


@dataclass
class Following:
    frontends: Frontends
    server: GrpcServer
    channel: grpc.aio.Channel

    def follow(self) -> grpc.aio.StreamStreamCall[bytes, bytes]:
        metadata = (("authorization", "Bearer follow"),)
        return self.channel.stream_stream("/moeserve.v1.ControlService/Follow")(metadata=metadata)


@pytest.fixture(params=["with the controller", "beside it"])
async def following(request: pytest.FixtureRequest) -> AsyncIterator[Following]:
    """The server that frontends reach has the controller, or passes on what they say."""

    async def on_keys(_keys: frozenset[str]) -> None:
        pass

    frontends = Frontends("service", load_config(CONFIG).only(FrontendConfig), 1.0, on_keys)
    config = ServerConfig(port=0, max_queued_bytes=4 * MIB, max_message_bytes=2 * MIB)
    servers = [GrpcServer(config, lambda *_: None, control=Control(frontends, TOKENS))]
    port = await servers[0].start()
    if request.param == "beside it":
        shared = SharedPort(f"127.0.0.1:{port}", TOKENS)
        first, joining = (GrpcServer(config.model_copy(update={"processes": 2}), lambda *_: None, engine=echo_engine()), shared)
        port = await first.start()
        more = config.model_copy(update={"processes": 2, "port": port})
        servers.append(GrpcServer(more, lambda *_: None, engine=echo_engine(), shared=joining))
        await servers[1].start()
        await first.stop()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Following(frontends, servers[-1], channel)
    for server in reversed(servers):
        await server.stop()


async def test_reports_take_no_room_once_they_were_heard(following: Following) -> None:
    stream = following.follow()
    for number in range(60):
        report = Report(f"f-{number}", requested=(bytes(200_000),))
        await stream.write(report.to_message().SerializeToString())
        await until_async(lambda name=report.name: [member.name for member in following.frontends.members()] == [name])  # type: ignore[misc]
        await asyncio.sleep(0.02)  # in which the server looks at what has come
    assert not stream.done()
    stream.cancel()
    await until_async(lambda: not following.frontends.members())
