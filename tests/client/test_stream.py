"""Many requests over one call, with both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from moeserve import errors
from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.client import AsyncClient, Client, WireRequest, WireResponse, through_layers
from tests.client.calls import Calls
from tests.support.engine import FakeEngine, X, identity, spec
from tests.support.servers import served
from tests.support.waiting import until, until_async


async def test_a_stream_answers_each_request(calls: Calls) -> None:
    requests = [WireRequest(X * n, layer=n % 2, request_id=str(n)) for n in range(6)]
    requests.insert(3, WireRequest(X, layer="nothing", request_id="bad"))
    answers: dict[str, WireResponse] = {answer.request_id: answer for answer in await calls.forward_stream(requests)}
    bad = answers.pop("bad").result
    assert isinstance(bad, errors.UnknownLayer)
    assert {name: answer.result.hidden_states.tolist() for name, answer in answers.items()} == {
        str(n): (X * n * (n % 2 + 1)).tolist() for n in range(6)
    }


async def test_what_the_requests_of_a_stream_raise_is_raised(calls: Calls) -> None:
    def requests() -> Iterator[WireRequest]:
        yield WireRequest(X)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await calls.forward_stream(requests())
    with pytest.raises(errors.InvalidRequest, match="int64"):
        await calls.forward_stream([WireRequest(X), WireRequest(X.long())])
    with pytest.raises(errors.InvalidRequest, match=r"^a request must be a WireRequest, got Tensor$"):
        await calls.forward_stream([WireRequest(X), X])


async def test_a_stream_takes_no_longer_than_its_timeout(calls: Calls, engine: FakeEngine, target: str) -> None:
    engine.gate.clear()

    async def has_begun() -> bool:
        with pytest.raises(errors.DeadlineExceeded, match=rf"no answer from {target} within 0\.3 s"):
            await calls.forward_stream([WireRequest(X)], timeout=0.3)
        return bool(engine.requests)

    await until_async(has_begun)
    await until_async(lambda: engine.cancelled == len(engine.requests))


async def test_requests_of_a_stream_may_be_asynchronous(target: str) -> None:
    async def requests() -> AsyncIterator[WireRequest]:
        for n in range(3):
            yield WireRequest(X, request_id=str(n))

    async with AsyncClient(target) as client:
        assert {answer.request_id async for answer in client.forward_stream(requests())} == {"0", "1", "2"}


async def test_a_source_that_waits_is_ended_when_the_service_ends_the_stream(engine: FakeEngine) -> None:
    """It would wait for ever, and what it has open would stay open."""
    ended = asyncio.Event()

    async def requests() -> AsyncIterator[WireRequest]:
        try:
            yield WireRequest(X)
            await asyncio.Event().wait()
        finally:
            ended.set()

    with served(engine) as (target, server, thread):
        async with AsyncClient(target) as client:
            stream = client.forward_stream(requests())
            await anext(stream)
            thread.call(server.drain(10))
            with pytest.raises(errors.ExpertUnavailable, match="draining"):
                await anext(stream)
            await asyncio.wait_for(ended.wait(), 30)


class SlowFirst(FakeEngine):
    """Its gate holds up batches of zeros only."""

    async def forward(self, layer: int, request: LayerRequest) -> ForwardOutput:
        return await super().forward(layer, request) if not request.hidden_states.any() else self.answer(layer, request)


async def test_batches_behind_a_slow_one_are_not_taken_without_end() -> None:
    """Their answers would have to be kept until it has its own."""
    ahead: list[int] = []
    outputs: list[torch.Tensor] = []

    def batches() -> Iterator[torch.Tensor]:
        for number in range(20):
            ahead.append(number - len(outputs))
            yield number * X

    engine = SlowFirst([(spec("layer"), identity)])
    with served(engine) as (target, _, thread):
        thread.soon(engine.gate.clear)
        async with AsyncClient(target) as client:

            async def collect() -> None:
                async for output in through_layers(client, batches(), ["layer"], in_flight=3):
                    outputs.append(output)

            running = asyncio.create_task(collect())
            await until_async(lambda: len(ahead) >= 3 and engine.requests)
            for _ in range(10):  # round trips, in which others could be answered
                await client.layers()
            thread.soon(engine.gate.set)
            await running
            with pytest.raises(errors.InvalidRequest, match="in_flight is 0; allowed: at least 1"):
                await anext(through_layers(client, [X], [0], in_flight=0))
    assert [output[0, 1].item() for output in outputs] == list(range(20))
    assert max(ahead) < 3


def test_leaving_a_stream_cancels_the_rest(target: str, engine: FakeEngine) -> None:
    def requests() -> Iterator[WireRequest]:
        yield WireRequest(X[:0], request_id="first")
        engine.gate.clear()
        yield WireRequest(X, request_id="second")

    with Client(target) as client:
        stream = client.forward_stream(requests())
        assert next(stream).request_id == "first"
        until(lambda: engine.requests)
        stream.close()
        until(lambda: engine.cancelled)
