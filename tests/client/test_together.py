"""Several calls of one client at a time: small ones that start together share a message, and each gets what it would get alone."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from moeserve import errors
from moeserve.client import AsyncClient, Client
from moeserve.client.submitting import MAX_SUBMITTED
from moeserve.client.together import Together
from moeserve.v1 import moe_service_pb2 as pb
from tests.support.engine import EXPERTS, HIDDEN, FakeEngine, X, identity, spec
from tests.support.servers import served
from tests.support.waiting import until, until_async


@pytest.fixture
async def client(target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(target) as client:
        yield client


def rows(number: int) -> torch.Tensor:
    return torch.full((1, HIDDEN), float(number))


async def test_small_calls_that_start_together_reach_the_engine_together(client: AsyncClient, engine: FakeEngine) -> None:
    answers = await asyncio.gather(*(client.forward(rows(number), layer=1) for number in range(65)))
    assert [answer.hidden_states[0, 0].item() for answer in answers] == [2.0 * number for number in range(65)]
    assert engine.together_sizes == [64]  # the first one went at once


async def test_one_call_after_the_other_goes_alone(client: AsyncClient, engine: FakeEngine) -> None:
    for number in range(3):
        await client.forward(rows(number))
    assert len(engine.requests) == 3
    assert engine.together_sizes == []


async def test_layers_timeouts_and_large_requests_do_not_mix(client: AsyncClient, engine: FakeEngine) -> None:
    large = torch.ones(2000, HIDDEN)
    calls = [
        client.forward(rows(0)),
        *(client.forward(rows(1), layer=0) for _ in range(2)),
        *(client.forward(rows(1), layer=1) for _ in range(3)),
        *(client.forward(rows(1), layer=0, timeout=20) for _ in range(4)),
        *(client.forward(large, layer=1) for _ in range(5)),
    ]
    answers = await asyncio.gather(*calls)
    assert sorted(engine.together_sizes) == [2, 3, 4]
    assert all(torch.equal(answer.hidden_states, 2 * large) for answer in answers[-5:])


async def test_more_than_fit_in_a_message_go_in_several(client: AsyncClient, engine: FakeEngine) -> None:
    answers = await asyncio.gather(*(client.forward(rows(number)) for number in range(300)))
    assert [int(answer.hidden_states[0, 0]) for answer in answers] == list(range(300))
    assert sorted(engine.together_sizes) == [43, 256]


async def test_each_has_its_own_error(client: AsyncClient) -> None:
    calls = [client.forward(rows(0)), client.forward(rows(1)), client.forward(rows(2) / 0), client.forward(rows(3)[:, :5])]
    first, second, infinite, narrow = await asyncio.gather(*calls, return_exceptions=True)
    assert not isinstance(first, BaseException)
    assert not isinstance(second, BaseException)
    assert second.hidden_states[0, 0] == 1
    for error in (infinite, narrow):
        assert isinstance(error, errors.InvalidRequest)
        assert [one.field for one in error.violations] == ["hidden_states"]
    assert "finite" in str(infinite)
    assert str(HIDDEN) in str(narrow)


async def test_what_is_refused_is_tried_again(client: AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()
    first = asyncio.create_task(client.forward(rows(0)))
    await until_async(lambda: len(engine.requests) == 1)
    engine.errors = [errors.Overloaded("full", 0.01), errors.ExpertUnavailable("no host", 0.01)]
    others = asyncio.gather(*(client.forward(rows(number)) for number in range(1, 4)))
    await until_async(lambda: len(engine.requests) == 4)
    engine.open_gate()
    assert [int(answer.hidden_states[0, 0]) for answer in await others] == [1, 2, 3]
    await first
    assert len(engine.requests) == 6


async def test_the_deadline_of_the_calls_is_that_of_their_message(client: AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()

    async def have_begun() -> bool:
        calls = [client.forward(rows(number), timeout=0.3) for number in range(4)]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(answer, errors.DeadlineExceeded)
        return len(engine.requests) >= 4

    await until_async(have_begun)
    await until_async(lambda: engine.cancelled == len(engine.requests))


async def test_work_ends_when_all_calls_of_a_message_are_cancelled(client: AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()
    calls = [asyncio.create_task(client.forward(rows(number))) for number in range(4)]
    await until_async(lambda: len(engine.requests) == 4)
    calls[1].cancel()
    await asyncio.wait({calls[1]})
    calls[2].cancel()
    calls[3].cancel()
    await until_async(lambda: engine.cancelled == 3)
    engine.open_gate()
    assert (await calls[0]).hidden_states[0, 0] == 0


async def test_one_that_is_cancelled_disturbs_no_other(client: AsyncClient, engine: FakeEngine) -> None:
    engine.gate.clear()
    calls = [asyncio.create_task(client.forward(rows(number))) for number in range(4)]
    await until_async(lambda: len(engine.requests) == 4)
    calls[2].cancel()
    engine.open_gate()
    assert [int((await calls[number]).hidden_states[0, 0]) for number in (0, 1, 3)] == [0, 1, 3]


async def test_a_service_with_a_smaller_limit_gets_them_one_by_one(engine: FakeEngine) -> None:
    with served(engine, max_message_bytes=2**16) as (target, _, _):
        async with AsyncClient(target) as client:
            large = torch.ones(500, HIDDEN)  # 32 kB
            answers = await asyncio.gather(*(client.forward(number * large) for number in range(6)))
            assert [int(answer.hidden_states[0, 0]) for answer in answers] == list(range(6))


async def test_a_service_that_is_older_gets_them_one_by_one() -> None:
    """It knows Forward only."""
    calls = 0

    async def forward(request: pb.ForwardRequest, _context: object) -> pb.ForwardResponse:
        nonlocal calls
        calls += 1
        tensors = dict.fromkeys(("hidden_states", "requested", "processed", "dropped", "dropped_tokens"), request.hidden_states)
        return pb.ForwardResponse(**tensors)

    handler = grpc.unary_unary_rpc_method_handler(forward, pb.ForwardRequest.FromString, pb.ForwardResponse.SerializeToString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("moeserve.v1.MoEService", {"Forward": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        for _ in range(2):
            answers = await asyncio.gather(*(client.forward(rows(number)) for number in range(5)))
            assert [int(answer.hidden_states[0, 0]) for answer in answers] == list(range(5))
    await server.stop(None)
    assert calls == 10


async def test_what_goes_one_by_one_has_the_time_that_is_left() -> None:
    """A large limit is found out late."""
    given: dict[str, list[float | None]] = {"forward": [], "forward_many": []}
    first = asyncio.Event()

    async def send(method: str, _message: bytes, timeout_s: float | None) -> bytes:
        given[method].append(timeout_s)
        if method == "forward_many":
            await asyncio.sleep(0.05)
            first.set()
            raise errors.InvalidRequest("the message is too large")
        await first.wait()
        return b""

    together = Together()
    await asyncio.gather(*(together.call(send, b"rows", 0, 10.0) for _ in range(3)))
    assert given["forward_many"] == [10.0]
    assert [timeout_s is not None and timeout_s < 9.96 for timeout_s in given["forward"]] == [False, True, True]


@pytest.fixture
def blocking(target: str) -> Iterator[Client]:
    with Client(target) as client:
        yield client


def test_submitted_calls_are_in_progress_side_by_side(blocking: Client, engine: FakeEngine) -> None:
    engine.gate.clear()
    futures = [blocking.submit(rows(number), layer=1) for number in range(20)]
    until(lambda: len(engine.requests) == 20)
    assert not any(future.done() for future in futures)
    engine.open_gate()
    assert [int(future.result(10).hidden_states[0, 0]) for future in futures] == [2 * number for number in range(20)]


def test_errors_of_submitted_calls_are_raised_by_their_futures(blocking: Client) -> None:
    with pytest.raises(errors.UnknownLayer):
        blocking.submit(X, layer=9).result(10)
    with pytest.raises(errors.InvalidRequest):
        blocking.submit("text").result(10)  # type: ignore[arg-type]
    assert torch.equal(blocking.submit(X).result(10).hidden_states, X)


def test_a_submitted_call_can_be_given_up(blocking: Client, engine: FakeEngine) -> None:
    engine.gate.clear()
    future = blocking.submit(X)
    until(lambda: engine.requests)
    assert future.cancel()
    until(lambda: engine.cancelled == 1)


def test_only_so_many_are_in_progress(target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(target) as client:
        for number in range(MAX_SUBMITTED):
            client.submit(rows(number))
        late: list[int] = []
        waiting = threading.Thread(target=lambda: late.append(int(client.submit(rows(7)).result(30).hidden_states[0, 0])))
        waiting.start()
        until(lambda: len(engine.requests) == MAX_SUBMITTED)
        assert not late
        engine.open_gate()
        waiting.join(30)
    assert late == [7]
    assert len(engine.requests) == MAX_SUBMITTED + 1


def test_calls_that_wait_for_room_end_when_the_client_is_closed(target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    client = Client(target)
    for number in range(MAX_SUBMITTED):
        client.submit(rows(number))
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(client.submit, X) for _ in range(4)]
        until(lambda: all(each.running() for each in waiting) and len(engine.requests) == MAX_SUBMITTED)
        client.close()
        for each in waiting:
            with pytest.raises(errors.MoEServeError, match="this client is closed"):
                each.result(30)


def test_closing_cancels_what_was_submitted(target: str, engine: FakeEngine) -> None:
    engine.gate.clear()
    client = Client(target)
    futures = [client.submit(rows(number)) for number in range(3)]
    until(lambda: len(engine.requests) == 3)
    client.close()
    assert all(future.cancelled() for future in futures)
    until(lambda: engine.cancelled == 3)
    with pytest.raises(errors.MoEServeError, match="closed"):
        client.submit(X)


def test_copies_have_calls_of_their_own(blocking: Client) -> None:
    assert torch.equal(blocking.submit(X).result(10).hidden_states, X)
    for other in (copy.deepcopy(blocking), pickle.loads(pickle.dumps(blocking))):
        assert torch.equal(other.submit(X).result(10).hidden_states, X)
        other.close()
    assert torch.equal(blocking.submit(X).result(10).hidden_states, X)


async def test_an_empty_request_among_others(engine: FakeEngine) -> None:
    with served(FakeEngine([(spec("layer"), identity)])) as (target, _, _):
        async with AsyncClient(target) as client:
            answers = await asyncio.gather(*(client.forward(X[:count]) for count in (1, 0, 2, 3)))
            assert [answer.hidden_states.shape[0] for answer in answers] == [1, 0, 2, 3]
            assert answers[1].requested.tolist() == [0] * EXPERTS
