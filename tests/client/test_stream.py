"""Many requests over one call, with both clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from moeserve import errors
from moeserve.client import AsyncClient, Client, WireRequest, WireResponse
from tests.client.calls import Calls
from tests.support.engine import FakeEngine, X
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


async def test_a_stream_takes_no_longer_than_its_timeout(calls: Calls, engine: FakeEngine, target: str) -> None:
    engine.gate.clear()
    with pytest.raises(errors.DeadlineExceeded, match=rf"no answer from {target} within 0\.3 s"):
        await calls.forward_stream([WireRequest(X)], timeout=0.3)
    await until_async(lambda: engine.cancelled)


async def test_requests_of_a_stream_may_be_asynchronous(target: str) -> None:
    async def requests() -> AsyncIterator[WireRequest]:
        for n in range(3):
            yield WireRequest(X, request_id=str(n))

    async with AsyncClient(target) as client:
        assert {answer.request_id async for answer in client.forward_stream(requests())} == {"0", "1", "2"}


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
