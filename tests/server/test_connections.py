"""What the kernel says of connections, and ending one, where a caller talks to two ports from the same port of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from moeserve.server.connections import hang_up, received_bytes

#: bytes that each brings
BROUGHT = (1000, 7)


@pytest.fixture
def connections() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Two, each as its caller has it, and as this process does."""
    with ExitStack() as stack:
        ends: list[tuple[socket.socket, socket.socket]] = []
        for nbytes in BROUGHT:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            calling = stack.enter_context(socket.socket())
            calling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            calling.bind(ends[0][0].getsockname() if ends else ("127.0.0.1", 0))
            calling.connect(listening.getsockname())
            calling.settimeout(30)
            accepted = stack.enter_context(listening.accept()[0])
            calling.sendall(bytes(nbytes))
            assert len(accepted.recv(nbytes, socket.MSG_WAITALL)) == nbytes
            ends.append((calling, accepted))
        assert len({calling.getsockname() for calling, _ in ends}) == 1
        yield ends


def test_what_comes_by_another_port_of_this_process_is_not_counted(connections: list[tuple[socket.socket, socket.socket]]) -> None:
    caller = connections[0][0].getsockname()
    ports = [accepted.getsockname()[1] for _, accepted in connections]
    assert [received_bytes([caller], port) for port in ports] == [{caller: nbytes} for nbytes in BROUGHT]


@pytest.mark.parametrize("number", [0, 1])
def test_the_connection_to_one_port_ends_and_the_other_goes_on(connections: list[tuple[socket.socket, socket.socket]], number: int) -> None:
    calling, accepted = connections[number]
    host, port = calling.getsockname()
    assert hang_up(f"ipv4:{host}:{port}", accepted.getsockname()[1])
    assert calling.recv(1) == b""
    other, served = connections[1 - number]
    served.sendall(b"x")
    assert other.recv(1) == b"x"
    assert not hang_up(f"ipv4:{host}:{port}", 1)
