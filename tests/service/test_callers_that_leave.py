"""Callers that cancel, are too late or ask for what cannot be: nothing of theirs is computed that need not be, and nothing is kept."""

from __future__ import annotations

import asyncio
import gc
import re
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import torch

from moeserve.api.wire import WireRequest, encode_forward_request
from moeserve.transport import give_back_pools
from tests.support.harness import CHANNELS, Kind, ServiceHarness, received
from tests.support.held import Held
from tests.support.waiting import until

HIDDEN = 64
#: of a quarter of a megabyte; what it brings is seen when it stays
MESSAGE = encode_forward_request(WireRequest(torch.randn(1024, HIDDEN)))
WRONG_WIDTH = encode_forward_request(WireRequest(torch.randn(1000, HIDDEN + 1)))
TOO_MANY = encode_forward_request(WireRequest(torch.randn(40_000, HIDDEN)))
NOISE = b"\xff" * 2**18
CALLS = 12


CONFIG = {
    "layers": [{"hidden_size": HIDDEN, "intermediate_size": 16, "num_experts": 4}],
    "placement": {"num_hosts": 1},
    "server": {"port": 0, "max_queued_tokens": 32_768},
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceHarness]:
    with ServiceHarness(CONFIG, "shm", tmp_path) as running:
        yield running


@pytest.fixture
def channel(service: ServiceHarness) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.target) as channel:
        yield channel


def forward(channel: grpc.Channel, message: bytes = MESSAGE, timeout_s: float = 30) -> grpc.Future:
    return channel.unary_unary("/moeserve.v1.MoEService/Forward").future(message, timeout=timeout_s)


def stream(channel: grpc.Channel, message: bytes, count: int) -> Iterator[bytes]:
    call = channel.stream_stream("/moeserve.v1.MoEService/ForwardStream")
    return call(iter([message] * count), timeout=30)


def queued(service: ServiceHarness) -> float:
    """Tokens that wait or are computed, and rows that hosts owe."""
    stats = service.frontend.stats()
    return stats.queue_tokens + sum(host.queue_tokens for host in stats.hosts)


def leave_the_queue(service: ServiceHarness, channel: grpc.Channel) -> None:
    """Some are cancelled, and some are too late or refused as they would be, while a host is busy with somebody else's."""
    held = Held(service.hosts[0])
    busy = forward(channel)
    assert held.begun.acquire(timeout=30)
    cancelled = [forward(channel) for _ in range(CALLS // 2)]
    until(lambda: service.frontend.stats().queue_tokens == 1024 * (1 + CALLS // 2))
    late = [forward(channel, timeout_s=0.2) for _ in range(CALLS // 2)]
    for call in late:
        error = call.exception()
        is_refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "is due" in error.details()
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED or is_refused, error
    for call in cancelled:
        call.cancel()
    until(lambda: queued(service) == 2 * 1024)  # what the host is busy with: it has been told of all else
    held.let_go()
    busy.result()


def ask_for_what_cannot_be(service: ServiceHarness, channel: grpc.Channel) -> None:
    for message in (WRONG_WIDTH, TOO_MANY, NOISE):
        for _ in range(CALLS):
            assert forward(channel, message).exception() is not None


def ask_for_it_in_streams(service: ServiceHarness, channel: grpc.Channel) -> None:
    for message in (WRONG_WIDTH, TOO_MANY, NOISE):
        assert len(list(stream(channel, message, CALLS))) == CALLS


def leave_streams(service: ServiceHarness, channel: grpc.Channel) -> None:
    for _ in range(CALLS):
        answers = stream(channel, MESSAGE, 20)
        next(answers)
        answers.cancel()  # type: ignore[attr-defined]


def lose_a_pass(service: ServiceHarness, channel: grpc.Channel) -> None:
    """The host fails to compute, so its error is what everybody in the batch gets."""
    held = Held(service.hosts[0])
    held.let_go()
    held.error = ZeroDivisionError()
    calls = [forward(channel) for _ in range(CALLS)]
    assert {call.exception().code() for call in calls} == {grpc.StatusCode.INTERNAL}


WAYS = (leave_the_queue, ask_for_what_cannot_be, ask_for_it_in_streams, leave_streams, lose_a_pass)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_call_has_brought_goes_with_it(
    way: Callable[[ServiceHarness, grpc.Channel], None], service: ServiceHarness, channel: grpc.Channel
) -> None:
    """At once: cycles of references would keep megabytes until Python looks for them, which it does when there are many objects."""
    way(service, channel)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        way(service, channel)
        until(lambda: queued(service) == 0)
        service.call(asyncio.sleep(0))
        until(lambda: tracemalloc.get_traced_memory()[0] < len(MESSAGE) * 2)
    finally:
        tracemalloc.stop()
        gc.enable()
    until(nothing_is_lent)


def nothing_is_lent() -> bool:
    """Once the host has answered what nobody waits for any more."""
    give_back_pools()
    return lent_bytes() == 0


def lent_bytes() -> int:
    """Of memory that frontends share with hosts, what is in use."""
    mappings = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(match[1]) for one in mappings if "memfd:moeserve" in one and (match := re.search(r"Rss:\s+(\d+) kB", one)))


def test_what_nobody_waits_for_is_not_computed(service: ServiceHarness, channel: grpc.Channel) -> None:
    host = service.hosts[0]
    leave_the_queue(service, channel)
    assert len(forward(channel).result()) > len(MESSAGE)
    assert received(host) == 2, "what the host was busy with, and the last"


@pytest.mark.parametrize("kind", CHANNELS)
def test_what_a_host_has_not_begun_it_does_not_compute(kind: Kind, tmp_path: Path) -> None:
    """Whatever way it has come: it is there, behind what the host computes, when its caller leaves, or vanishes with its connection."""
    with ServiceHarness(CONFIG, kind, tmp_path) as service, grpc.insecure_channel(service.target) as channel:
        held = Held(service.hosts[0])
        for leave in (lambda call, _: call.cancel(), lambda _, connection: connection.close()):
            # Word of it may come to the host when it has begun: seldom.
            until(partial(is_not_computed, service, channel, held, leave))


def is_not_computed(service: ServiceHarness, channel: grpc.Channel, held: Held, leave: Callable[[grpc.Future, grpc.Channel], None]) -> bool:
    """Whether a call that is given up while the host is busy has no pass, and one that comes later has one."""
    busy = forward(channel)
    assert held.begun.acquire(timeout=30)
    with grpc.insecure_channel(service.target, options=[("grpc.use_local_subchannel_pool", 1)]) as connection:
        call = forward(connection)
        until(lambda: owed(service) == 2 * 1024)
        leave(call, connection)
        until(lambda: owed(service) == 1024)
        held.leave.release()
        busy.result()
        held.leave.release(2)
        forward(channel).result()
    passes = 0
    while held.begun.acquire(blocking=False):
        passes += 1
    for _ in range(2 - passes):
        assert held.leave.acquire(timeout=30)
    return passes == 1


def owed(service: ServiceHarness) -> int:
    return sum(host.queue_tokens for host in service.frontend.stats().hosts)
