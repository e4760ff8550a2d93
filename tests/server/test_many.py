"""Requests that come in one message, as any client may send them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import torch

from moeserve import errors
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.messages import request, tokens, value
from tests.support.servers import Running
from tests.support.waiting import until_async


async def test_answers_come_in_the_order_of_the_requests(running: Running) -> None:
    message = pb.ForwardManyRequest(requests=[request(tokens(count), layer=count % 2, request_id=str(count)) for count in range(1, 6)])
    answers = (await running.stub.ForwardMany(message)).responses
    assert [answer.request_id for answer in answers] == ["1", "2", "3", "4", "5"]
    assert [value(answer.hidden_states)[0, 0].item() for answer in answers] == [1, 0, 1, 0, 1]
    assert running.engine.together_sizes == [5]
    assert await running.observed.until(5) == [("ForwardMany", "OK")] * 5


async def test_a_request_that_fails_is_answered_by_its_error(running: Running) -> None:
    running.engine.errors = [KeyError("x")]
    bad = [request(request_id="a"), request(layer=9, request_id="b"), request(tokens() / 0, request_id="c"), request(request_id="d")]
    answers = (await running.stub.ForwardMany(pb.ForwardManyRequest(requests=bad))).responses
    codes = [grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT]
    assert [answer.error.code for answer in answers] == [*(code.value[0] for code in codes), 0]
    assert [one.field for one in answers[2].error.violations] == ["hidden_states"]
    assert torch.equal(value(answers[3].hidden_states), tokens())


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (b"\x0a\xff", "not a message of several requests"),
        (pb.ForwardManyRequest(requests=[request(tokens(1))] * 257).SerializeToString(), "257 requests came together; allowed: 256"),
    ],
)
async def test_what_cannot_come_together_is_refused(running: Running, message: bytes, sentence: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.channel.unary_unary("/moeserve.v1.MoEService/ForwardMany")(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in (caught.value.details() or "")


async def test_none_is_answered_by_none(running: Running) -> None:
    assert list((await running.stub.ForwardMany(pb.ForwardManyRequest())).responses) == []


async def test_a_caller_that_leaves_cancels_all_of_it(running: Running) -> None:
    running.engine.gate.clear()
    call = running.stub.ForwardMany(pb.ForwardManyRequest(requests=[request()] * 3))
    await until_async(lambda: len(running.engine.requests) == 3)
    call.cancel()
    await until_async(lambda: running.engine.cancelled == 3)


async def test_they_are_refused_together_where_any_would_be(running: Running) -> None:
    running.engine.refusing = errors.Overloaded("full")
    with pytest.raises(grpc.aio.AioRpcError, match="full"):
        await running.stub.ForwardMany(pb.ForwardManyRequest(requests=[request()]))
    assert running.engine.requests == []


async def test_draining_answers_those_that_run(running: Running) -> None:
    running.engine.gate.clear()
    call = asyncio.ensure_future(running.stub.ForwardMany(pb.ForwardManyRequest(requests=[request()] * 2)))
    await until_async(lambda: len(running.engine.requests) == 2)
    draining = asyncio.create_task(running.server.drain(10))
    running.engine.gate.set()
    assert len((await call).responses) == 2
    await draining
