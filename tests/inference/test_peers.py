"""Whose process calls: what shared memory by name is given for."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress

import pytest

from moeserve.server.inference.peers import runs_as_this_user

NOBODY = 65534


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.1:80", "ipv6:%5B2001:db8::1%5D:80", "ipv4:127.0.0.1:1", "unix:", "unix:@x", "", "nonsense"])
def test_callers_elsewhere_or_unknown_are_not_of_the_same_user(peer: str) -> None:
    assert not runs_as_this_user(peer)


def test_callers_by_either_protocol_are_known() -> None:
    for server, client in (("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "::ffff:127.0.0.1"), ("::", "127.0.0.1")):
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        with suppress(OSError), socket.socket(family) as listener:
            listener.bind((server, 0))
            listener.listen()
            with socket.create_connection((client, listener.getsockname()[1])):
                connection, (host, port, *_) = listener.accept()
                with connection:
                    assert runs_as_this_user(f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user, too")
def test_another_user_who_calls_from_a_port_of_this_user_is_known() -> None:
    with ExitStack() as opened:
        servers = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]

        def connect(server: socket.socket, port: int) -> str:
            client = opened.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("127.0.0.1", port))
            client.connect(server.getsockname())
            connection, (host, port) = server.accept()
            opened.enter_context(connection)
            return f"ipv4:{host}:{port}"

        peer = connect(servers[0], 0)
        assert runs_as_this_user(peer)
        os.seteuid(NOBODY)
        try:
            assert connect(servers[1], int(peer.rpartition(":")[2])) == peer
        finally:
            os.seteuid(0)
        assert not runs_as_this_user(peer)
