"""A service that was away is found again within seconds, however long that was; its name may stand for other addresses by then."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
import torch

from moeserve import errors
from moeserve.client import AdminClient, AsyncClient, Client, ControlClient, WireRequest
from moeserve.client.failures import to_error
from tests.client.calls import Calls
from tests.support.engine import HIDDEN, FakeEngine, X, identity, spec
from tests.support.listeners import listener
from tests.support.names import names
from tests.support.ports import kept_port
from tests.support.servers import served
from tests.support.waiting import until_async

#: gRPC's own pauses grow by 60 % each, so that this many attempts take it some 40 s
ATTEMPTS = 8
PATIENCE_S = 25.0


def is_tried(call: Callable[[], object], attempts: Callable[[], int]) -> bool:
    """Whether calls of an impatient program lead to attempts that do not become ever rarer."""
    end = time.monotonic() + PATIENCE_S
    while attempts() < ATTEMPTS and time.monotonic() < end:
        with pytest.raises(errors.ServiceUnreachable, match="is unavailable"):
            call()
        time.sleep(0.1)
    return attempts() >= ATTEMPTS


def test_attempts_to_reach_a_service_do_not_become_rare() -> None:
    """Those of each client, and of each to find out what a name stands for."""
    with ExitStack() as stack:
        away = [stack.enter_context(listener()) for _ in range(3)]
        nameless, runner = stack.enter_context(names()), stack.enter_context(asyncio.Runner())
        client, admin, named = Client(away[0].target), AdminClient(away[1].target, "token"), Client(nameless.target(50051))
        asynchronous = AsyncClient(away[2].target)
        with client, admin, named, ThreadPoolExecutor(4) as pool:
            tries = (
                pool.submit(is_tried, client.layers, lambda: len(away[0].asked)),
                pool.submit(is_tried, admin.status, lambda: len(away[1].asked)),
                pool.submit(is_tried, lambda: runner.run(asynchronous.layers()), lambda: len(away[2].asked)),
                pool.submit(is_tried, named.layers, lambda: nameless.asked),
            )
            assert [each.result() for each in tries] == [True] * 4
        runner.run(asynchronous.close())


def test_a_machine_that_says_nothing_may_be_busy_with_starting_the_service() -> None:
    """It takes connections, and nobody has read from them when gRPC gives one up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        soon = [("grpc.min_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 100)]
        with grpc.insecure_channel(target, options=soon) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/moeserve.v1.MoEService/Forward")(b"", timeout=20)
    error = to_error(caught.value, target, 20)
    assert isinstance(error, errors.ServiceUnreachable) and error.may_return


async def test_a_token_that_is_long_in_coming_holds_up_nothing_else() -> None:
    """As that of a controller which has stopped: a program that follows it answers meanwhile."""
    is_asked, goes_on = threading.Event(), threading.Event()
    held_up: list[bool] = []

    def token() -> str:
        if is_asked.is_set():
            held_up.append(not goes_on.wait(10))
        is_asked.set()  # the first time, when the client is made
        return "token"

    async def follow() -> None:
        async with ControlClient("127.0.0.1:1", token).follow():
            pass

    following = asyncio.create_task(follow())
    await until_async(is_asked.is_set)
    goes_on.set()
    await following
    assert held_up == [False]


async def test_new_frontends_behind_a_name_get_work(engine: FakeEngine, connect: Callable[..., Calls]) -> None:
    """From a client that is connected to an older one, which goes later; no call fails."""
    other = FakeEngine([(spec("model.layers.0.mlp"), identity)])
    with names("127.0.0.1") as name, ExitStack() as old:
        old.enter_context(served(engine, port=(port := kept_port()), max_connection_age_s=0.3))
        calls = connect(name.target(port))
        await calls.forward(X)
        with served(other, host="127.0.0.2", port=port, max_connection_age_s=0.3):
            for addresses, new in ((("127.0.0.1", "127.0.0.2"), other), (("127.0.0.1",), engine), (("127.0.0.2",), other)):
                name.addresses = addresses
                before = len(new.requests)
                async with asyncio.timeout(30):
                    while len(new.requests) == before:
                        await calls.forward(X)
            old.close()
            for _ in range(20):
                await calls.forward(X)


async def test_nothing_fails_and_nothing_is_lost_when_connections_age(engine: FakeEngine, connect: Callable[..., Calls]) -> None:
    """Dozens of times, under load of every kind; a stream stays where it is."""
    large = torch.randn(60_000, HIDDEN)
    with served(engine, max_connection_age_s=0.05) as (target, _, _):
        end = time.monotonic() + 1.0

        async def forwards(hidden_states: torch.Tensor) -> None:
            calls = connect(target)
            while time.monotonic() < end:
                assert torch.equal((await calls.forward(hidden_states)).hidden_states, hidden_states)

        async def stream() -> None:
            sent: list[str] = []

            def requests() -> Iterator[WireRequest]:
                while time.monotonic() < end:
                    sent.append(str(len(sent)))
                    yield WireRequest(X, request_id=sent[-1])
                    time.sleep(0.005)

            answers = await connect(target).forward_stream(requests())
            assert sorted(answer.request_id for answer in answers) == sorted(sent)

        await asyncio.gather(forwards(X), forwards(X), forwards(large), stream())
