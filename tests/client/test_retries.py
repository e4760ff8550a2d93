"""A call that may be run twice is made again when that helps, within its time; both clients alike."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeserve import errors
from moeserve.api.request import LayerRequest
from moeserve.client import retries
from moeserve.client.retries import Retries
from moeserve.v1 import moe_service_pb2 as pb
from moeserve.v1 import moe_service_pb2_grpc as pb_grpc
from tests.client.calls import Calls
from tests.support.engine import HIDDEN, FakeEngine, X
from tests.support.ports import kept_port
from tests.support.servers import served
from tests.support.waiting import until_async


async def test_a_refused_call_is_made_again_when_the_service_says(calls: Calls, engine: FakeEngine) -> None:
    engine.errors = [errors.Overloaded("later", 0.2), errors.Overloaded("later", 0.01)]
    began = time.monotonic()
    assert torch.equal((await calls.forward(X)).hidden_states, X)
    assert len(engine.requests) == 3 and time.monotonic() - began >= 0.21


async def test_a_call_that_was_made_again_and_not_answered_tells_its_whole_time(
    calls: Calls, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse_then_wait(layer: int, request: LayerRequest) -> NoReturn:
        engine.requests.append((layer, request))
        if len(engine.requests) == 1:
            raise errors.Overloaded("later", 0.1)
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(engine, "forward", refuse_then_wait)
    with pytest.raises(errors.DeadlineExceeded, match="within 2 s"):
        await calls.forward(X, timeout=2)
    assert len(engine.requests) == 2


async def test_a_call_refused_before_it_was_read_is_made_again(calls: Calls, engine: FakeEngine) -> None:
    engine.refusing = errors.Overloaded("later", 0.05)
    call = asyncio.create_task(calls.forward(X))
    await until_async(lambda: len(engine.callers) >= 3)
    engine.refusing = None
    assert torch.equal((await call).hidden_states, X)


async def test_all_steps_of_a_call_share_its_time(connect: Callable[..., Calls]) -> None:
    """Memory for large tensors is asked for first, which takes a while here."""
    left_s: list[float] = []

    class Slow(pb_grpc.MoEServiceServicer):
        async def OpenMemory(self, request: pb.OpenMemoryRequest, context: Any) -> pb.OpenMemoryResponse:
            await asyncio.sleep(1)
            return pb.OpenMemoryResponse()

        async def Forward(self, request: pb.ForwardRequest, context: Any) -> None:
            left_s.append(context.time_remaining())
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "it was seen")

    server = grpc.aio.server()
    pb_grpc.add_MoEServiceServicer_to_server(Slow(), server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    with pytest.raises(errors.InvalidRequest, match="it was seen"):
        await connect(target).forward(torch.zeros(2**14, HIDDEN), timeout=5)
    await server.stop(None)
    assert left_s[0] < 4.5


async def test_a_call_without_limit_has_none_although_its_client_has_one(calls: Calls, engine: FakeEngine) -> None:
    await calls.forward(X, timeout=math.inf)
    assert engine.requests[-1][1].deadline is None


@pytest.mark.parametrize("raised", [errors.Overloaded("in a minute", 60), errors.Overloaded("never fits", None)])
async def test_what_does_not_help_within_the_time_is_not_tried(calls: Calls, engine: FakeEngine, raised: errors.Overloaded) -> None:
    engine.errors = [raised] * 2
    with pytest.raises(errors.Overloaded, match=str(raised)) as caught:
        await calls.forward(X, timeout=5)
    assert len(engine.requests) == 1 and caught.value.retry_after_s == raised.retry_after_s


async def test_a_service_that_is_started_again_is_waited_for(engine: FakeEngine, connect: Callable[..., Calls]) -> None:
    """Also by a client that has never seen it; not for longer than the call may take."""
    with ExitStack() as first:
        target, _, _ = first.enter_context(served(engine, port=(port := kept_port())))
        calls = connect(target)
        await calls.forward(X)
        first.close()
        with pytest.raises((errors.ServiceUnreachable, errors.DeadlineExceeded)):
            await calls.forward(X, timeout=0.5)
        waiting = [asyncio.create_task(one.forward(X)) for one in (calls, connect(target))]
        await asyncio.sleep(1.5)  # so long it is away
        assert not any(call.done() for call in waiting)
        with served(engine, port=port):
            for answer in await asyncio.gather(*waiting):
                assert torch.equal(answer.hidden_states, X)


async def test_a_service_that_has_answered_is_waited_for_as_long_as_a_call_may_take(
    engine: FakeEngine, connect: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has never heard of it gives up before."""
    monkeypatch.setattr(retries, "_AWAY_S", 0.1)
    with served(engine, port=(port := kept_port())) as (target, _, _):
        known = connect(target)
        await known.forward(X)
    waiting = asyncio.create_task(known.forward(X))
    for _ in range(2):
        with pytest.raises(errors.ServiceUnreachable):
            await connect(target).forward(X)
    with served(engine, port=port):
        assert torch.equal((await waiting).hidden_states, X)


@pytest.mark.parametrize(
    ("raised", "timeout_s", "is_known", "at_least_s"),
    [
        (errors.ServiceUnreachable("x"), 60.0, True, 59.0),
        (errors.ExpertUnavailable("it starts", 1.0), 60.0, True, 59.0),
        (errors.ServiceUnreachable("x"), None, True, 30.0),
        (errors.ServiceUnreachable("x"), 60.0, False, 5.0),
        (errors.ExpertUnavailable("experts are lacking"), 60.0, True, 0.0),
        (errors.ServiceUnreachable("it speaks HTTP/1", may_return=False), 60.0, True, 0.0),
    ],
)
def test_how_long_a_service_is_waited_for(
    raised: errors.ExpertUnavailable, timeout_s: float | None, is_known: bool, at_least_s: float
) -> None:
    now, call = 0.0, Retries(timeout_s, 0.0)
    while (pause_s := call.pause_s(raised, now, is_known=is_known)) is not None:
        now += pause_s
    assert at_least_s <= now <= at_least_s + 1


def test_experts_that_are_lacking_after_a_long_start_are_asked_for_again() -> None:
    call = Retries(60.0, 0.0)
    assert call.pause_s(errors.ServiceUnreachable("x"), 0.0, is_known=True) is not None
    assert call.pause_s(errors.ExpertUnavailable("experts are lacking"), 12.0, is_known=True) is not None


@given(
    st.one_of(st.none(), st.floats(0.01, 100)), st.lists(st.tuples(st.sampled_from(["away", "busy", "draining", "lost"]), st.floats(0, 1)))
)
def test_attempts_end_with_the_time_of_the_call_and_a_service_that_stays_away(
    timeout_s: float | None, ends: list[tuple[str, float]]
) -> None:
    kinds = {
        "away": errors.ServiceUnreachable("x"),
        "busy": errors.Overloaded("x", 0.3),
        "draining": errors.ExpertUnavailable("x", 1.0),
        "lost": errors.ExpertUnavailable("x"),
    }
    now, away_since, lost = 0.0, None, 0
    call = Retries(timeout_s, now)
    for kind, seconds in ends:
        now += seconds
        lost += kind == "lost"
        away_since = (now if away_since is None else away_since) if kind != "busy" else None
        pause_s = call.pause_s(kinds[kind], now)
        if pause_s is None:
            is_lost = kind == "lost" and lost >= 4
            assert is_lost or (timeout_s is not None and now + 0.75 >= timeout_s) or (away_since is not None and now - away_since > 5)
            return
        assert 0 < pause_s <= 0.75
        assert kind != "busy" or pause_s >= 0.3
        now += pause_s
        left_s = call.left_s(now)
        assert (left_s is None) == (timeout_s is None) and (left_s is None or left_s > 0)
        overslept_s = call.left_s(now + 1000)  # a busy machine wakes whom it will
        assert timeout_s is None or 0 < overslept_s <= left_s
