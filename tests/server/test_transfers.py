"""Bytes of callers: what there is no room for is not read, and who does not send or does not read is not waited for for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from moeserve.errors import Overloaded
from moeserve.server import transfers
from moeserve.server.arriving import MessageStream, _Connection
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.descriptors import no_free_descriptors
from tests.support.engine import HIDDEN
from tests.support.http2 import call_that_takes_nothing
from tests.support.listeners import Wire
from tests.support.messages import request, tokens
from tests.support.servers import Running, run
from tests.support.waiting import until_async

FORWARD, STREAM = "/moeserve.v1.MoEService/Forward", "/moeserve.v1.MoEService/ForwardStream"
MIB = 2**20
#: a message of 1 MiB and some bytes, as is its answer
LARGE = request(torch.zeros(2**14, HIDDEN), request_id="large")
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

Serve = Callable[..., Coroutine[None, None, Running]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts servers with `max_queued_bytes` and whatever else is told."""
    started = []

    async def start(max_queued_bytes: int, **config: object) -> Running:
        started.append(await run(max_queued_bytes=max_queued_bytes, **config))
        return started[-1]

    yield start
    for running in started:
        await running.stop()


def silent(running: Running, method: str = FORWARD) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    """A call that sends no message."""
    return running.channel.stream_stream(method)(timeout=20)


async def refused(answer: Coroutine[None, None, object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value


async def hold(running: Running) -> asyncio.Task[pb.ForwardResponse]:
    """A large request that is under way until the engine's gate is opened."""
    running.engine.gate.clear()
    answer = asyncio.ensure_future(running.stub.Forward(LARGE))
    await until_async(lambda: len(running.engine.requests) == 1)
    assert running.server.queue_bytes > MIB
    return answer


async def test_what_there_is_no_room_for_is_refused_before_it_is_sent(serve: Serve) -> None:
    running = await serve(MIB)
    held = await hold(running)
    error = await refused(silent(running).read())
    assert error.code() is EXHAUSTED and "server.max_queued_bytes is 1048576, so nothing more is read" in (error.details() or "")
    status = rpc_status.from_call(error)
    assert status is not None and any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
    # What brings no tensors is answered all the same.
    assert len((await running.stub.ListLayers(pb.ListLayersRequest())).layers) == 2
    await health_pb2_grpc.HealthStub(running.channel).Check(health_pb2.HealthCheckRequest())
    running.engine.gate.set()
    await held
    await until_async(lambda: running.server.queue_bytes == 0)
    assert (await running.stub.Forward(LARGE)).request_id == "large"


async def test_a_message_that_does_not_fit_is_refused_and_a_smaller_one_is_answered(serve: Serve) -> None:
    running = await serve(MIB * 3 // 2)
    held = await hold(running)
    calls = [asyncio.ensure_future(running.stub.Forward(message)) for message in (LARGE, request())]
    stream = running.stub.ForwardStream(iter([LARGE, request(request_id="small")]))
    assert (await refused(asyncio.wait_for(calls[0], 20))).code() is EXHAUSTED
    first = await stream.read()
    assert (first.request_id, first.error.code) == ("large", EXHAUSTED.value[0])
    running.engine.gate.set()
    await asyncio.gather(held, calls[1])
    assert (await stream.read()).request_id == "small"
    await until_async(lambda: running.server.queue_bytes == 0)


async def test_only_so_many_messages_may_be_late(serve: Serve) -> None:
    """Here one; it keeps nobody from being served whose messages come soon, and is not waited for for ever either."""
    running = await serve(MIB, max_message_bytes=MIB, transfer_timeout_s=3)
    first = silent(running)
    await first.wait_for_connection()
    others = [silent(running) for _ in range(5)]
    codes = {(await refused(call.read())).code() for call in others}
    assert codes == {EXHAUSTED}
    assert (await running.stub.Forward(request())).HasField("hidden_states")
    error = await refused(first.read())
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "server.transfer_timeout_s = 3 s" in (error.details() or "")


async def test_what_has_come_while_the_server_itself_was_stopped_is_not_late(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """More messages than may be late."""
    running = await serve(MIB)
    monkeypatch.setattr(transfers, "LATE_S", 60.0)
    calls = [silent(running) for _ in range(5)]
    awaited = running.server._transfers._messages
    await until_async(lambda: len(awaited) == len(calls))
    answers = [asyncio.ensure_future(call.read()) for call in calls]
    writing = [asyncio.ensure_future(call.write(request().SerializeToString())) for call in calls]
    late_s = time.monotonic() - min(message.began for message in awaited) + 1.0
    monkeypatch.setattr(transfers, "LATE_S", late_s)
    asyncio.get_running_loop().call_soon(time.sleep, late_s)
    assert all(pb.ForwardResponse.FromString(answer).HasField("hidden_states") for answer in await asyncio.gather(*answers))
    await asyncio.gather(*writing)


async def test_a_message_is_late_also_for_a_server_that_is_always_behind(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "LATE_S", 0.05)
    running = await serve(MIB, transfer_timeout_s=0.1)
    reading = asyncio.ensure_future(silent(running).read())
    async with asyncio.timeout(15):
        while not reading.done():
            asyncio.get_running_loop().call_soon(time.sleep, 0.04)
            await asyncio.sleep(0)
    assert (await refused(reading)).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_message_that_does_not_come_is_given_up_although_no_descriptor_was_free(serve: Serve) -> None:
    """Connections are files: what cannot be looked at for a while is looked at later."""
    running = await serve(MIB, transfer_timeout_s=3)
    await running.stub.ListLayers(pb.ListLayersRequest())
    call = silent(running)
    reading = asyncio.ensure_future(call.read())
    await until_async(lambda: running.server._transfers.arriving._connections)
    with no_free_descriptors():
        looked_at = running.server._transfers.arriving._look_at
        await until_async(lambda: running.server._transfers.arriving._look_at != looked_at or running.server._watching.done())
    error = await refused(asyncio.wait_for(reading, 15))
    assert "server.transfer_timeout_s = 3 s" in (error.details() or "")


async def test_a_message_that_does_not_come_holds_up_no_drain(serve: Serve) -> None:
    running = await serve(MIB)
    call = silent(running)
    reading = asyncio.ensure_future(call.read())
    await running.stub.ListLayers(pb.ListLayersRequest())
    async with asyncio.timeout(10):
        await running.server.drain(60)
    assert (await refused(asyncio.wait_for(reading, 20))).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_without_a_message_is_told_so(serve: Serve) -> None:
    running = await serve(MIB)
    call = silent(running)
    await call.done_writing()
    error = await refused(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and error.details() == "the call brought no message"


async def test_who_does_not_take_his_answer_is_hung_up_on(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Of one call, and of a stream; nobody else is disturbed."""
    running = await serve(64 * MIB, transfer_timeout_s=1.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(call_that_takes_nothing(FORWARD, request(tokens(64)).SerializeToString()))
    # Without probing, gRPC takes 64 KiB of what nobody reads; with it, megabytes on a busy machine.
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(running.target, options=own) as channel:
        stream = channel.stream_stream(STREAM)(iter([LARGE.SerializeToString()] * 20))
        await until_async(lambda: running.server.queue_bytes > MIB)
        async with asyncio.timeout(20):
            while await reader.read(2**16):
                pass
            # UNAVAILABLE as a rule; INTERNAL was seen once, on a busy machine, and its cause is not known.
            assert await stream.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}
    writer.close()
    await until_async(lambda: running.server.queue_bytes == 0)
    assert (await running.stub.Forward(LARGE)).request_id == "large"
    assert "has not taken an answer of" in caplog.text and "Traceback" not in caplog.text


async def test_what_a_stream_does_not_read_yet_is_not_late() -> None:
    """It has no room for more, or waits until an answer was taken; what has come meanwhile is late once it is waited for."""
    connection, stream = _Connection(0.0, received=0), MessageStream()
    connection.awaited[stream] = None
    for now in (1.0, 100.0):
        connection.look(MIB, now)
    assert connection.is_large and connection.taken_at == 100.0
    stream.read = asyncio.get_running_loop().create_future()
    connection.look(MIB, 200.0)
    assert connection.taken_at == 100.0 and connection.being_read == [stream]
    stream.read.set_result(b"")
    connection.look(MIB, 300.0)
    assert connection.taken_at == 300.0 and not connection.being_read


async def test_an_answer_is_counted_until_it_was_taken_also_when_its_stream_has_ended(serve: Serve) -> None:
    """Its caller is hung up on in the end, as if the stream had gone on."""
    running = await serve(64 * MIB, transfer_timeout_s=2)
    counted = running.server._transfers
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(running.target, options=own) as channel:
        stream = channel.stream_stream(STREAM)(iter([LARGE.SerializeToString()]))
        await until_async(lambda: counted._leaving)
        (reading,) = counted.arriving._streams.values()
        reading.refuse(lambda: Overloaded("no room"))
        await until_async(lambda: not counted.arriving._streams)
        assert running.server.queue_bytes > MIB
        async with asyncio.timeout(20):
            assert await stream.code() is grpc.StatusCode.UNAVAILABLE
    await until_async(lambda: running.server.queue_bytes == 0)


@asynccontextmanager
async def streams_of_half_a_message(running: Running, count: int) -> AsyncIterator[list[grpc.aio.StreamStreamCall[bytes, bytes]]]:
    """Each over a connection of its own, of which the rest never arrives."""
    wire = Wire(running.target, most_bytes=MIB * 3 // 4)
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        stack.callback(wire.close)
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(wire.target, options=own)) for _ in range(count)]
        streams = [channel.stream_stream(STREAM)() for channel in channels]
        writing = [asyncio.ensure_future(stream.write(LARGE.SerializeToString())) for stream in streams]
        yield streams
        await asyncio.gather(*writing, return_exceptions=True)


async def test_half_a_message_in_a_stream_is_not_kept_for_ever(serve: Serve) -> None:
    """A stream whose caller says nothing is left alone, also when it has been busy."""
    running = await serve(64 * MIB, transfer_timeout_s=1.5)
    quiet = running.stub.ForwardStream()
    for _ in range(3):
        await quiet.write(LARGE)
        assert (await quiet.read()).request_id == "large"
    async with streams_of_half_a_message(running, 1) as (half,):
        async with asyncio.timeout(20):
            assert await half.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "server.transfer_timeout_s = 1.5 s" in (await half.details() or "")
    await quiet.write(request(request_id="quiet"))
    assert (await quiet.read()).request_id == "quiet"


async def test_a_quiet_stream_is_not_late_for_calls_that_were_refused_or_given_up(serve: Serve) -> None:
    """They come over the same connection, and what they have brought is gone."""
    running = await serve(64 * MIB, transfer_timeout_s=0.5)
    quiet = running.stub.ForwardStream()
    await quiet.write(request(request_id="quiet"))
    await quiet.read()
    running.engine.refusing = Overloaded("full")
    for _ in range(40):
        assert (await refused(running.stub.Forward(LARGE))).code() is EXHAUSTED
    running.engine.refusing = None
    await asyncio.sleep(1)
    assert not quiet.done()
    await quiet.write(request(request_id="quiet"))
    assert (await quiet.read()).request_id == "quiet"


async def test_what_comes_in_streams_has_no_more_room_than_anything_else(serve: Serve) -> None:
    running = await serve(MIB)
    quiet = running.stub.ForwardStream()
    async with streams_of_half_a_message(running, 3) as streams:
        async with asyncio.timeout(20):
            done, kept = await asyncio.wait([asyncio.ensure_future(stream.code()) for stream in streams], return_when="FIRST_COMPLETED")
            while len(done) < 2:
                more, kept = await asyncio.wait(kept, return_when="FIRST_COMPLETED")
                done |= more
        assert {each.result() for each in done} == {EXHAUSTED}
        await quiet.write(request(request_id="quiet"))
        assert (await quiet.read()).request_id == "quiet"
        assert len(kept) == 1 and not any(each.done() for each in kept)
        for stream in streams:
            stream.cancel()
