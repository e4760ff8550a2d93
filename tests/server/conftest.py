from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from moeserve.config import ServerConfig
from moeserve.server import GrpcServer
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc

from .engine import EchoEngine


class Observed(list[tuple[str, str]]):
    """(method, code) of every call, and a way to wait for one that nobody answers."""

    def __init__(self) -> None:
        self._grown = asyncio.Event()

    def observe(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.append((method, code))
        self._grown.set()

    async def until(self, count: int) -> Observed:
        async with asyncio.timeout(10):
            while len(self) < count:
                self._grown.clear()
                await self._grown.wait()
        return self


@dataclass
class Running:
    """A server with an echo engine, and a client made of generated code only."""

    engine: EchoEngine
    server: GrpcServer
    port: int
    channel: grpc.aio.Channel
    observed: Observed

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def stub(self) -> pb_grpc.MoEServiceStub:
        return pb_grpc.MoEServiceStub(self.channel)


async def run(**config: object) -> Running:
    engine, observed = EchoEngine(), Observed()
    server = GrpcServer(ServerConfig(port=0, **config), observed.observe, engine=engine)
    port = await server.start()
    return Running(engine, server, port, grpc.aio.insecure_channel(f"127.0.0.1:{port}"), observed)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    started = await run(max_message_bytes=2**20, max_tokens_per_request=64)
    yield started
    await started.channel.close()
    await started.server.stop()
