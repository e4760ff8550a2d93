"""Whose process is at the other end of a connection: Linux knows it of every socket of this machine (sock_diag(7))."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from contextlib import suppress
from typing import Final

from moeserve.server.connections import Address, ends_of

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; numbers are the machine's, but for ports and addresses.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, number, sender
_REQUEST: Final = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_PORTS: Final = struct.Struct("!HH")
_REST_OF_ID: Final = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any interface, no cookie
_STATE: Final = _HEADER.size + 1
_ID: Final = _HEADER.size + 4
_UID: Final = _ID + 48 + 12
_ESTABLISHED: Final = 1
_TIMEOUT_S: Final = 1.0


def runs_as_this_user(peer: str) -> bool:
    """Whether `peer`, as gRPC calls it (ipv4:127.0.0.1:1234), is a process of this machine that runs as the user of this process.

    Only such a caller gains nothing by what this process may open. Of several connections to `peer`, none may be another user's.
    """
    ends = ends_of(peer)
    return bool(ends) and all(_is_of_this_user(*each) for each in ends)


def _is_of_this_user(ours: Address, theirs: Address) -> bool:
    return ipaddress.ip_address(theirs[0]).is_loopback and _owner(theirs, ours) == os.geteuid()


def _owner(local: Address, remote: Address) -> int | None:
    """The user of the socket with these ends; None = nobody can say."""
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    addresses = b"".join(socket.inet_pton(family, host).ljust(16, b"\0") for host, _ in (local, remote))
    ports = _PORTS.pack(local[1], remote[1])
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED) + ports + addresses + _REST_OF_ID
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT_S)
        kernel.send(header + request)
        answer = kernel.recv(4096)
        is_found = _HEADER.unpack_from(answer)[1] == _SOCK_DIAG_BY_FAMILY and len(answer) >= _UID + 4
        if is_found and answer[_STATE] == _ESTABLISHED and answer[_ID : _ID + _PORTS.size] == ports:
            return int(struct.unpack_from("=I", answer, _UID)[0])
    return None
