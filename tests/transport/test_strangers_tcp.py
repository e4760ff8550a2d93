"""Peers on the TCP port that may not connect, or do not keep to the protocol: they harm nobody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
import zmq

from moeserve.transport import (
    Channel,
    ChannelClosed,
    Destination,
    FrontendKeys,
    HostKeys,
    KeyPair,
    Limits,
    Listener,
    PassOn,
    WorkShape,
    connect,
    listen,
)
from moeserve.transport.wire import VERSION, Kind, WorkHeader, kind_of, layout_of, pack_note, pack_work, write_destinations

from .rig import PATIENCE_S, Rig, connect_patiently, random_message, send

LIMITS = Limits(2**16, 2**20)
SHAPE = WorkShape(2, 4, 3, torch.float32)
HELLO = pack_note(Kind.HELLO, code=VERSION)
BODY = bytes(layout_of(SHAPE).request_bytes)
WORK = pack_work(WorkHeader(1, 0, 0, 10**9, SHAPE, 0))

PASSED_ON = WorkShape(2, 4, 3, torch.float32, 2)


def addressed(*destinations: tuple[int, int]) -> list[bytes]:
    """Work to be passed on, with a body that is valid but for the destinations."""
    layout = layout_of(PASSED_ON)
    body = bytearray(layout.request_bytes)
    write_destinations(memoryview(body), layout, [Destination(*destination) for destination in destinations])
    return [pack_work(WorkHeader(1, 0, 0, 10**9, PASSED_ON, 0, PassOn.FAN_OUT)), bytes(body)]


MALFORMED = {
    "body without destinations": [addressed((0, 1), (1, 3))[0], BODY],
    "destinations nobody asked for": [WORK, addressed((0, 1), (1, 3))[1]],
    "a host twice": addressed((1, 1), (1, 3)),
    "pairs left over": addressed((0, 1), (1, 2)),
    "pairs that do not exist": addressed((0, 1), (1, 4)),
    "a host without pairs": addressed((0, 3), (1, 3)),
    "ends that fall": addressed((0, 3), (1, 2)),
    "noise": [b"\xff" * 30],
    "no body": [WORK],
    "short body": [WORK, BODY[:-1]],
    "long body": [WORK, BODY + b"\0"],
    "third frame": [WORK, BODY, b""],
    "row_index outside": [WORK, b"\1" * len(BODY)],
    "second hello": [HELLO],
    "truncated": [HELLO[:-1]],
    "empty": [b""],
}


@pytest.fixture
def tcp_rig() -> Iterator[Rig]:
    listener = listen("tcp://127.0.0.1:0", limits=LIMITS)
    yield Rig(listener, LIMITS, None)
    listener.close()


@pytest.fixture
def dealer(tcp_rig: Rig) -> Iterator[zmq.Socket[bytes]]:
    """A frontend that can send anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(tcp_rig.endpoint)
        yield sock


async def next_kind(rig: Rig, dealer: zmq.Socket[bytes]) -> Kind:
    async with asyncio.timeout(PATIENCE_S):
        while not dealer.poll(0):
            assert await asyncio.to_thread(rig.listener.poll, 0.01) == []
    return kind_of(dealer.recv())


@pytest.mark.parametrize("frames", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_message_ends_that_connection_only(
    tcp_rig: Rig, dealer: zmq.Socket[bytes], frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with tcp_rig.frontend() as channel:
        dealer.send(HELLO)
        assert await next_kind(tcp_rig, dealer) is Kind.ACCEPT
        dealer.send_multipart(frames)
        assert await next_kind(tcp_rig, dealer) is Kind.GOODBYE
        assert "disconnected a frontend" in caplog.text
        dealer.send_multipart([WORK, BODY])
        send(channel, random_message())
        (work,) = await tcp_rig.receive(1)
        assert work.hidden_states.shape == random_message().hidden_states.shape != (SHAPE.rows, SHAPE.hidden_size)


async def test_without_a_greeting_nothing_is_served(tcp_rig: Rig, dealer: zmq.Socket[bytes]) -> None:
    dealer.send_multipart([WORK, BODY])
    assert await next_kind(tcp_rig, dealer) is Kind.GOODBYE


async def test_noise_on_the_port_and_frames_over_the_limit_harm_nobody(tcp_rig: Rig, dealer: zmq.Socket[bytes]) -> None:
    async with tcp_rig.frontend() as channel:
        with socket.create_connection(("127.0.0.1", int(tcp_rig.endpoint.rpartition(":")[2]))) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            dealer.send_multipart([HELLO, bytes(LIMITS.max_message_bytes + 1)])
            await tcp_rig.forward(channel, random_message())


FRONTEND, HOST, STRANGER = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()


@pytest.mark.parametrize(
    "keys",
    [FrontendKeys(STRANGER, HOST.public), FrontendKeys(FRONTEND, STRANGER.public), None],
    ids=["unknown frontend", "another host", "no keys"],
)
async def test_who_lacks_the_right_keys_is_refused_at_once(keys: FrontendKeys | None) -> None:
    with closing(listen("tcp://127.0.0.1:0", limits=LIMITS, keys=HostKeys(HOST, frozenset({FRONTEND.public})))) as listener:
        connecting = asyncio.create_task(connect(listener.endpoints[0], keys=keys, timeout_s=PATIENCE_S))
        while not connecting.done():
            assert await asyncio.to_thread(listener.poll, 0.01) == []
        with pytest.raises(ChannelClosed, match=r"key|handshake"):
            await connecting
        rig = Rig(listener, LIMITS, FrontendKeys(FRONTEND, HOST.public))
        async with rig.frontend() as channel:
            await rig.forward(channel, random_message())


async def admitted(listener: Listener, keys: FrontendKeys) -> Channel:
    connecting = asyncio.create_task(connect_patiently(listener.endpoints[0], keys=keys))
    while not connecting.done():
        await asyncio.to_thread(listener.poll, 0.01)
    return await connecting


async def test_who_may_connect_changes_while_the_host_runs() -> None:
    """A key is admitted, then withdrawn: its open connection is hung up on, a new one refused, the others are not disturbed."""
    keys = HostKeys(HOST, frozenset({FRONTEND.public}))
    with closing(listen("tcp://127.0.0.1:0", limits=LIMITS, keys=keys)) as listener:
        rig = Rig(listener, LIMITS, FrontendKeys(FRONTEND, HOST.public))
        newcomer = FrontendKeys(STRANGER, HOST.public)
        async with rig.frontend() as channel:
            with pytest.raises(ChannelClosed, match="key"):
                await admitted(listener, newcomer)
            keys.allow({FRONTEND.public, STRANGER.public})
            guest = await admitted(listener, newcomer)
            await rig.forward(guest, random_message())
            keys.allow({FRONTEND.public})
            refused = send(guest, random_message())
            await rig.serve_until(refused.done)
            with pytest.raises(ChannelClosed, match="withdrawn"):
                await refused
            with pytest.raises(ChannelClosed, match="key"):
                await admitted(listener, newcomer)
            await rig.forward(channel, random_message())


async def test_a_host_without_keys_is_not_talked_to_with_keys(tcp_rig: Rig) -> None:
    with pytest.raises(ChannelClosed, match=r"key|handshake"):
        await connect(tcp_rig.endpoint, keys=FrontendKeys(FRONTEND, HOST.public), timeout_s=PATIENCE_S)


def test_secrets_stay_out_of_logs() -> None:
    assert HOST.secret not in repr(HostKeys(HOST, frozenset()))
