"""What the kernel says of the bytes that connections have brought."""

from __future__ import annotations

import socket
from contextlib import ExitStack

from moeserve.server.connections import received_bytes


def test_what_comes_by_another_port_of_this_process_is_not_counted() -> None:
    """A caller may talk to two of them from the same port of its own."""
    with ExitStack() as stack:
        ends = []
        for nbytes in (1000, 7):
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            calling = stack.enter_context(socket.socket())
            calling.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            calling.bind(ends[0][1] if ends else ("127.0.0.1", 0))
            calling.connect(listening.getsockname())
            accepted = stack.enter_context(listening.accept()[0])
            calling.sendall(bytes(nbytes))
            assert len(accepted.recv(nbytes, socket.MSG_WAITALL)) == nbytes
            ends.append((listening.getsockname()[1], calling.getsockname()))
        (first, caller), (second, same) = ends
        assert caller == same
        assert [received_bytes([caller], port) for port in (first, second)] == [{caller: 1000}, {caller: 7}]
