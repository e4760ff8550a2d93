"""What callers do that is no request: they watch and do not read, leave, keep streams open, come in crowds."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.errors import DeadlineExceeded
from tests.support.garbage import forget_lines
from tests.support.http2 import call_that_takes_nothing
from tests.support.messages import request
from tests.support.servers import Running, run

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def test_deadlines_that_end_while_an_error_is_sent_are_no_tracebacks(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    forget_lines(caplog)

    async def late(_layer: int, asked: LayerRequest) -> ForwardOutput:
        assert asked.deadline is not None
        await asyncio.sleep(asked.deadline - time.monotonic() - 0.001)
        raise DeadlineExceeded("too late")

    running.engine.forward = late  # type: ignore[method-assign]

    async def one(timeout: float) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await running.stub.Forward(request(), timeout=timeout)

    for _ in range(10):
        await asyncio.gather(*(one(random.uniform(0.05, 0.2)) for _ in range(100)))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_one_watcher_that_leaves_does_not_silence_the_others(running: Running) -> None:
    stub = health_pb2_grpc.HealthStub(running.channel)
    watchers = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(3)]
    for watcher in watchers:
        assert (await watcher.read()).status == NOT_SERVING
    watchers[0].cancel()
    await stub.Check(health_pb2.HealthCheckRequest())
    for layer in range(2):
        running.server.set_serving(layer, True)
    for watcher in watchers[1:]:
        assert (await watcher.read()).status == SERVING


async def test_a_watcher_that_does_not_read_keeps_nobody_waiting(running: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(call_that_takes_nothing("/grpc.health.v1.Health/Watch", b""))
    kinds = []
    async with asyncio.timeout(20):
        while not kinds or kinds[-1] != 1:  # until the headers of its answer are there
            head = await reader.readexactly(9)
            kinds.append(head[3])
            await reader.readexactly(int.from_bytes(head[:3], "big"))
        stub = health_pb2_grpc.HealthStub(running.channel)
        for layer in range(2):
            running.server.set_serving(layer, True)
        while (await stub.Check(health_pb2.HealthCheckRequest())).status != SERVING:
            await asyncio.sleep(0)
        await running.server.drain(5)
    writer.close()


async def test_streams_are_bounded_and_other_calls_are_answered_beside_them(running: Running) -> None:
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(running.target, options=own) for _ in range(8)]
    for channel in channels:
        stub = health_pb2_grpc.HealthStub(channel)
        watchers = [stub.Watch(health_pb2.HealthCheckRequest(service="nothing")) for _ in range(512)]
        assert {(await watcher.read()).status for watcher in watchers} == {health_pb2.HealthCheckResponse.SERVICE_UNKNOWN}
    with pytest.raises(grpc.aio.AioRpcError, match="4096 streams are open; allowed: 4096 of all callers together") as caught:
        await running.stub.ForwardStream().read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await running.stub.Forward(request())).HasField("hidden_states")
    await channels[0].close()
    async with asyncio.timeout(20):
        while not await is_let_in(running):
            pass
    for channel in channels[1:]:
        await channel.close()


async def is_let_in(running: Running) -> bool:
    try:
        await health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest()).read()
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return False
    return True


async def test_connections_are_bounded_by_what_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))
    running = await run()
    strangers = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(10)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.Forward(request(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for _, writer in strangers:
        writer.close()
    assert (await running.stub.Forward(request(), timeout=20, wait_for_ready=True)).HasField("hidden_states")
    await running.channel.close()
    await running.server.stop()


GARBAGE = """
import moeserve.cli

import asyncio, os, pathlib, sys
from tests.support.certificates import Authority
from tests.support.servers import run

async def main():
    folder = pathlib.Path(sys.argv[1])
    cert, key = Authority(folder, "ours").sign("server")
    key.chmod(0o600)
    running = await run(tls_cert=cert, tls_key=key)
    for message in (b"GET / HTTP/1.1", os.urandom(200), b"\\x16\\x03\\x01\\x02\\x00\\x01" + os.urandom(100)) * 5:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(message)
        writer.close()
        await writer.wait_closed()
    await running.channel.close()
    await running.server.stop()

asyncio.run(main())
"""


def test_connections_that_do_not_speak_tls_are_no_lines(tmp_path: Path) -> None:
    root, environment = Path(__file__).parents[2], {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", GARBAGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
