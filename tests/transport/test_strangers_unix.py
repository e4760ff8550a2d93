"""Peers on the unix socket that may not connect, or do not keep to the protocol: they harm nobody else."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moeserve.errors import Cancelled
from moeserve.memory import create_shared
from moeserve.transport import ChannelClosed, Limits, WorkShape, listen
from moeserve.transport.wire import VERSION, Kind, WorkHeader, kind_of, pack_note, pack_work, unpack_note
from tests.support.descriptors import open_files

from .rig import Rig, random_message

POOL_BYTES = 2**20
LIMITS = Limits(2**16, POOL_BYTES)
SHAPE = WorkShape(2, 4, 3, torch.float32)
HELLO = pack_note(Kind.HELLO, code=VERSION, value=POOL_BYTES)


def work(shape: WorkShape = SHAPE, offset: int = 0, work_id: int = 1) -> bytes:
    return pack_work(WorkHeader(work_id, 0, 0, 10**9, shape, offset))


def patched(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes([value]) + packet[at + 1 :]


def relayed(destinations: int, way: int = 1) -> bytes:
    shape = WorkShape(2, 4, 3, torch.float32, destinations)
    return patched(pack_work(WorkHeader(1, 0, 0, 10**9, shape, 0)), 2, way)


MALFORMED = {
    "one destination": relayed(1),
    "destinations, but nothing to do with them": relayed(2, 0),
    "something to do, but no destinations": relayed(0),
    "unknown way to pass on": relayed(2, 3),
    "more destinations than pairs": relayed(4),
    "destinations beyond counting": relayed(2**32 - 1),
    "destinations without pairs": relayed(2),
    "noise": b"\xff" * 30,
    "unknown kind": b"\0" * 16,
    "short work": work()[:-1],
    "long work": work() + b"\0",
    "dtype int64": patched(work(), 1, 4),
    "unknown dtype": patched(work(), 1, 77),
    "no rows": work(WorkShape(0, 4, 3, torch.float32)),
    "over max_message_bytes": work(WorkShape(2**14, 4, 3, torch.float32)),
    "enormous": work(WorkShape(2**32 - 1, 2**32 - 1, 2**32 - 1, torch.float32)),
    "a host's packet": pack_note(Kind.REPLY, value=1),
    "second hello": HELLO,
    "truncated cancel": pack_note(Kind.CANCEL, value=1)[:-1],
    "larger than any packet": b"\x05" * 3000,
}


@pytest.fixture
def unix_rig(tmp_path: Path) -> Iterator[Rig]:
    listener = listen(f"unix:{tmp_path}/host.sock", limits=LIMITS)
    yield Rig(listener, LIMITS, None)
    listener.close()


def raw_frontend(rig: Rig, greet: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(rig.endpoint.removeprefix("unix:"))
    if greet:
        fd, memory = create_shared(POOL_BYTES)
        # indices 0 and local_experts 0 are valid, so only what the test breaks is broken
        memory[:64] = bytes(64)
        socket.send_fds(sock, [HELLO], [fd])
        os.close(fd)
        rig.listener.poll(0)  # accepts
        rig.listener.poll(0)  # reads the greeting
        assert kind_of(sock.recv(100)) is Kind.ACCEPT
    return sock


def next_packet(sock: socket.socket) -> bytes:
    """But for heartbeats, which come on a slow machine, where work is owed."""
    while kind_of(packet := sock.recv(2000)) is Kind.HEARTBEAT:
        pass
    return packet


def assert_hung_up(rig: Rig, sock: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    assert rig.listener.poll(0) == []
    assert kind_of(next_packet(sock)) is Kind.GOODBYE
    assert sock.recv(2000) == b""
    assert "disconnected a frontend" in caplog.text
    sock.close()


@pytest.mark.parametrize("packet", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_packet_ends_that_connection_only(unix_rig: Rig, packet: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with unix_rig.frontend() as channel:
        sock = raw_frontend(unix_rig)
        sock.send(packet)
        assert_hung_up(unix_rig, sock, caplog)
        await unix_rig.forward(channel, random_message())


@pytest.mark.parametrize("offset", [1, 64, POOL_BYTES, POOL_BYTES - 64, 2**64 - 4096])
def test_a_block_must_lie_in_the_arena(unix_rig: Rig, offset: int, caplog: pytest.LogCaptureFixture) -> None:
    sock = raw_frontend(unix_rig)
    sock.send(work(offset=offset))
    assert_hung_up(unix_rig, sock, caplog)


def test_an_id_is_used_once_at_a_time(unix_rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    sock = raw_frontend(unix_rig)
    sock.send(work(work_id=7))
    (first,) = unix_rig.listener.poll(0)
    sock.send(work(work_id=7))
    assert_hung_up(unix_rig, sock, caplog)
    assert first.is_cancelled


def test_work_and_its_cancellation_in_one_go_never_reach_the_host(unix_rig: Rig) -> None:
    sock = raw_frontend(unix_rig)
    sock.send(work(work_id=7))
    sock.send(pack_note(Kind.CANCEL, value=7))
    assert unix_rig.listener.poll(0) == []
    answer = unpack_note(next_packet(sock))
    assert answer.value == 7 and isinstance(answer.error(), Cancelled)
    sock.close()


def test_cancelling_what_is_not_there_is_harmless(unix_rig: Rig) -> None:
    sock = raw_frontend(unix_rig)
    sock.send(pack_note(Kind.CANCEL, value=99))
    sock.send(work())
    assert len(unix_rig.listener.poll(0)) == 1
    sock.close()


def _no_fd(sock: socket.socket) -> None:
    sock.send(HELLO)


def _unsealed(sock: socket.socket) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, POOL_BYTES)
    socket.send_fds(sock, [HELLO], [fd])
    os.close(fd)


def _hello_with(value: int, version: int = VERSION, memory_bytes: int = POOL_BYTES) -> Callable[[socket.socket], None]:
    def greet(sock: socket.socket) -> None:
        fd, _ = create_shared(memory_bytes)
        socket.send_fds(sock, [pack_note(Kind.HELLO, code=version, value=value)], [fd])
        os.close(fd)

    return greet


def _two_fds(sock: socket.socket) -> None:
    fds = [create_shared(POOL_BYTES)[0], create_shared(POOL_BYTES)[0]]
    socket.send_fds(sock, [HELLO], fds)
    for fd in fds:
        os.close(fd)


BAD_GREETINGS = {
    "no descriptor": _no_fd,
    "two descriptors": _two_fds,
    "unsealed": _unsealed,
    "smaller than announced": _hello_with(POOL_BYTES, memory_bytes=4096),
    "over max_pool_bytes": _hello_with(2 * POOL_BYTES, memory_bytes=2 * POOL_BYTES),
    "empty": _hello_with(0),
    "another version": _hello_with(POOL_BYTES, version=VERSION + 1),
}


@pytest.mark.parametrize("greet", BAD_GREETINGS.values(), ids=BAD_GREETINGS.keys())
def test_a_bad_greeting_is_refused(unix_rig: Rig, greet: Callable[[socket.socket], None], caplog: pytest.LogCaptureFixture) -> None:
    before = open_files()
    sock = raw_frontend(unix_rig, greet=False)
    unix_rig.listener.poll(0)
    greet(sock)
    assert_hung_up(unix_rig, sock, caplog)
    assert open_files() <= before


async def test_a_frontend_refused_for_its_limits_is_told_why(unix_rig: Rig) -> None:
    with pytest.raises(ChannelClosed, match=f"pool of {2 * POOL_BYTES} bytes"):
        async with unix_rig.frontend(Limits(2**16, 2 * POOL_BYTES)):
            pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder, "host.sock")
        listener = listen(f"unix:{path}")
        Path(folder).chmod(0o711)
        path.chmod(0o666)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.seteuid(65534)
        try:
            sock.connect(str(path))
        finally:
            os.seteuid(0)
        listener.poll(1)
        assert sock.recv(100) == b""
        assert "another user" in caplog.text
        sock.close()
        listener.close()
