"""Machines that vanish: the kernel still says that their connections are there."""

from __future__ import annotations

import grpc
import pytest
import torch

from tests.support.engine import HIDDEN
from tests.support.listeners import Wire
from tests.support.messages import request
from tests.support.servers import run
from tests.support.waiting import until_async

MIB = 2**20


async def test_a_connection_that_nobody_is_at_the_end_of_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a stream, of a call, and of a call that has not sent its message."""
    for name, value in (("_KEEPALIVE_MS", 300), ("_KEEPALIVE_TIMEOUT_MS", 2000)):
        monkeypatch.setattr(f"moeserve.server.grpc_server.{name}", value)
    large = request(torch.zeros(2**14, HIDDEN), request_id="large").SerializeToString()
    running = await run(max_queued_bytes=64 * MIB)
    try:
        running.engine.gate.clear()
        wire = Wire(running.target)
        async with grpc.aio.insecure_channel(wire.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            service = "/moeserve.v1.MoEService/"
            calls = [channel.unary_unary(f"{service}Forward")(large), channel.stream_stream(f"{service}Forward")()]
            stream = channel.stream_stream(f"{service}ForwardStream")()
            await stream.write(large)
            await until_async(lambda: len(running.engine.requests) == 2)
            assert running.server.queue_bytes > 2 * MIB
            wire.cut()
            await until_async(lambda: running.engine.cancelled == 2 and running.server.queue_bytes == 0)
            del calls
        wire.close()
        running.engine.gate.set()
        assert (await running.stub.Forward(request())).HasField("hidden_states")
    finally:
        await running.stop()
