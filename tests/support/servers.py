"""A real gRPC server for an engine: beside a test in a thread of its own, or on the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from moeserve.addresses import join
from moeserve.config import ServerConfig
from moeserve.loops import LoopThread
from moeserve.server.grpc_server import GrpcServer
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.support.engine import FakeEngine, echo_engine
from tests.support.waiting import PATIENCE_OF_LOOPS_S


@contextmanager
def served(engine: FakeEngine, **config: object) -> Iterator[tuple[str, GrpcServer, LoopThread]]:
    """host:port, the server and its event loop, which runs in another thread."""
    where, thread = ServerConfig(**{"port": 0, **config}), LoopThread("server")
    thread.start()

    async def start() -> tuple[GrpcServer, int]:
        server = GrpcServer(where, lambda method, code, seconds: None, engine=engine)
        return server, await server.start()

    try:
        server, port = thread.call(start())
        try:
            yield join(where.host, port), server, thread
        finally:
            thread.call(server.stop())
    finally:
        thread.stop()


class Observed(list[tuple[str, str]]):
    """(method, code) of every call, and a way to wait for one that nobody answers."""

    def __init__(self) -> None:
        self._grown = asyncio.Event()

    def observe(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.append((method, code))
        self._grown.set()

    async def until(self, count: int) -> Observed:
        async with asyncio.timeout(PATIENCE_OF_LOOPS_S):
            while len(self) < count:
                self._grown.clear()
                await self._grown.wait()
        return self


@dataclass
class Running:
    """A server with an echo engine, and a client made of generated code only."""

    engine: FakeEngine
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

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop()


async def run(**config: object) -> Running:
    engine, observed = echo_engine(), Observed()
    server = GrpcServer(ServerConfig(port=0, **config), observed.observe, engine=engine)
    port = await server.start()
    return Running(engine, server, port, grpc.aio.insecure_channel(f"127.0.0.1:{port}"), observed)
