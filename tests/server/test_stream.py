"""Many requests over one call: any order, errors as answers, bounded, cancellable, drained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import torch

from moeserve import errors
from moeserve.server.stream import FIRST_BYTES, MAX_STREAM_REQUESTS
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import tensor_pb2
from tests.support.engine import HIDDEN
from tests.support.garbage import forget_lines
from tests.support.messages import request, tokens, value
from tests.support.servers import Running, run
from tests.support.waiting import until_async


async def test_answers_are_matched_by_id(running: Running) -> None:
    call = running.stub.ForwardStream(iter([request(tokens(count), request_id=str(count)) for count in range(1, 6)]))
    answers = {answer.request_id: answer async for answer in call}
    assert {name: answer.hidden_states.shape[0] for name, answer in answers.items()} == {str(count): count for count in range(1, 6)}
    assert await call.code() is grpc.StatusCode.OK
    assert await running.observed.until(5) == [("ForwardStream", "OK")] * 5


async def test_one_at_a_time_needs_no_ids(running: Running) -> None:
    call = running.stub.ForwardStream()
    for count in (1, 2, 3):
        await call.write(request(tokens(count)))
        answer = await call.read()
        assert torch.equal(value(answer.hidden_states), tokens(count))
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_a_slow_request_holds_nobody_up(running: Running) -> None:
    call = running.stub.ForwardStream()
    running.engine.gate.clear()
    await call.write(request(request_id="slow"))
    await until_async(lambda: running.engine.requests)
    await call.write(request(tokens(0), request_id="quick"))
    assert (await call.read()).request_id == "quick"
    running.engine.gate.set()
    assert (await call.read()).request_id == "slow"


BAD = {
    "UNKNOWN LAYER": (request(layer=9, request_id="bad"), grpc.StatusCode.NOT_FOUND),
    "not finite": (request(tokens() / 0, request_id="bad"), grpc.StatusCode.INVALID_ARGUMENT),
    "bytes missing": (
        pb.ForwardRequest(request_id="bad", hidden_states=tensor_pb2.Tensor(dtype=1, shape=[3, 16], data=b"12")),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_answered_and_the_stream_goes_on(running: Running, case: str) -> None:
    bad, code = BAD[case]
    call = running.stub.ForwardStream(iter([request(request_id="1"), bad, request(request_id="2")]))
    answers = {answer.request_id: answer async for answer in call}
    assert set(answers) == {"1", "bad", "2"}
    assert answers["bad"].error.code == code.value[0]
    assert answers["bad"].error.message
    assert not answers["bad"].HasField("hidden_states")
    assert all(torch.equal(value(answers[name].hidden_states), tokens()) and not answers[name].HasField("error") for name in ("1", "2"))


async def test_bytes_that_are_no_message_are_answered_too(running: Running) -> None:
    call = running.channel.stream_stream("/moeserve.v1.MoEService/ForwardStream")(iter([b"\xff\xff", request().SerializeToString()]))
    answers = [pb.ForwardResponse.FromString(data) async for data in call]
    assert sorted(answer.error.code for answer in answers) == [0, grpc.StatusCode.INVALID_ARGUMENT.value[0]]


@pytest.mark.parametrize(
    ("raised", "sentence"), [(errors.Overloaded("full"), "full"), (KeyError("x"), "internal error; the server's log says more")]
)
async def test_errors_of_the_engine_are_answers(running: Running, raised: Exception, sentence: str) -> None:
    running.engine.errors = [raised]
    (answer,) = [answer async for answer in running.stub.ForwardStream(iter([request(request_id="1")]))]
    assert (answer.request_id, answer.error.message) == ("1", sentence)


async def test_an_answer_that_is_too_large_to_be_sent_is_an_error_of_its_request() -> None:
    running = await run(max_message_bytes=2**16)
    large = request(tokens(1000), request_id="large", return_routing=True)
    assert large.ByteSize() < 2**16
    call = running.stub.ForwardStream(iter([large, request(request_id="small")]))
    answers = {answer.request_id: answer async for answer in call}
    assert answers["large"].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "server.max_message_bytes is 65536" in answers["large"].error.message
    assert torch.equal(value(answers["small"].hidden_states), tokens())
    await running.stop()


async def test_only_so_many_run_at_once(running: Running) -> None:
    running.engine.gate.clear()
    messages = [request(tokens(1), request_id=str(number)) for number in range(MAX_STREAM_REQUESTS * 2)]
    call = running.stub.ForwardStream(iter(messages))
    await until_async(lambda: len(running.engine.requests) == MAX_STREAM_REQUESTS)
    # A call of its own gets through, so the stream had every chance to run more.
    await running.stub.ListLayers(pb.ListLayersRequest())
    assert len(running.engine.requests) == MAX_STREAM_REQUESTS
    running.engine.gate.set()
    assert {answer.request_id async for answer in call} == {message.request_id for message in messages}


async def test_large_requests_run_side_by_side_as_far_as_their_answers_are_read() -> None:
    running, more = await run(), asyncio.Event()
    message = request(torch.zeros(2**14, HIDDEN))  # 1 MiB, as is its answer

    async def messages() -> AsyncIterator[pb.ForwardRequest]:
        for _ in range(16):
            yield message
        await more.wait()
        for _ in range(20):
            yield message

    running.engine.gate.clear()
    answers = aiter(running.stub.ForwardStream(messages()))
    await until_async(lambda: len(running.engine.requests) == 8)
    await running.stub.ListLayers(pb.ListLayersRequest())
    assert len(running.engine.requests) == FIRST_BYTES // 2**20 == 8
    running.engine.gate.set()
    for _ in range(16):
        await anext(answers)
    running.engine.gate.clear()
    more.set()
    await until_async(lambda: len(running.engine.requests) == 16 + 20)
    running.engine.gate.set()
    assert len([answer async for answer in answers]) == 20
    await running.channel.close()
    await running.server.stop()


async def test_a_caller_that_leaves_cancels_all_of_it(running: Running) -> None:
    running.engine.gate.clear()
    call = running.stub.ForwardStream()
    for number in range(3):
        await call.write(request(request_id=str(number)))
    await until_async(lambda: len(running.engine.requests) == 3)
    call.cancel()
    await until_async(lambda: running.engine.cancelled == 3)


async def test_a_caller_that_vanishes_while_answers_are_written_is_not_our_mistake(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    forget_lines(caplog)
    for _ in range(10):
        channel = grpc.aio.insecure_channel(running.target)
        call = channel.stream_stream("/moeserve.v1.MoEService/ForwardStream")(iter([request(tokens(64)).SerializeToString()] * 50))
        await call.read()
        call.cancel()
        await channel.close()
    await running.server.drain(5)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_draining_answers_what_was_read_and_ends_the_stream(running: Running) -> None:
    running.engine.gate.clear()
    call = running.stub.ForwardStream()
    await call.write(request(request_id="running"))
    await until_async(lambda: running.engine.requests)
    draining = asyncio.create_task(running.server.drain(10))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.stub.Forward(request())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    running.engine.gate.set()
    assert (await call.read()).request_id == "running"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "unanswered requests of this stream were not run" in (caught.value.details() or "")
    await draining
