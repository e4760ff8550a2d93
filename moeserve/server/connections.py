"""Connections that gRPC has accepted: what they have brought, their ends, ending one. It has no calls for that, but sockets are files."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from moeserve.addresses import parse_target
from moeserve.errors import ConfigError

_FILES: Final = Path("/proc/self/fd")
#: of peers: their addresses are asked for with every message
_KNOWN: Final = 8192
#: of Linux's `struct tcp_info`: where `tcpi_bytes_received` is, 64 bits wide
_BYTES_RECEIVED: Final = 128

#: of the other end
Address = tuple[str, int]


@lru_cache(maxsize=_KNOWN)
def address_of(peer: str) -> Address:
    """A peer as gRPC calls it; one without an address is at port 0."""
    with suppress(ConfigError):
        for host, port in parse_target(unquote(peer)).hosts:
            return _plain(host, port)
    return peer, 0


def received_bytes(wanted: Collection[Address], port: int) -> dict[Address, int]:
    """How many bytes each of the TCP connections from `wanted` to `port` of this process has brought, as far as the system says it.

    A stranger may call from the port from which somebody talks to another port of this process, as to its metrics.
    """
    found: dict[Address, int] = {}
    # The latest connections, which are asked for most often, have the highest numbers as a rule.
    for fd in sorted(_descriptors(), reverse=True):
        if len(found) == len(wanted):
            break
        connection = None
        try:
            # As if of IPv6, whose addresses are the longest: asking what it is would cost as much again.
            connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=fd)
            peer = connection.getpeername()
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
            if len(info) == _BYTES_RECEIVED + 8 and (address := _plain(*peer[:2])) in wanted and connection.getsockname()[1] == port:
                found[address] = int.from_bytes(info[_BYTES_RECEIVED:], sys.byteorder)
        except (OSError, ValueError):
            pass  # no connection of TCP, or closed meanwhile
        finally:
            if connection is not None:
                connection.detach()
    return found


def hang_up(peer: str, port: int) -> bool:
    """Ends the TCP connection from `peer`, as gRPC calls it (ipv4:127.0.0.1:1234), to `port` of this process.

    Returns whether it was found; only Linux shows it. See `received_bytes` for others from that peer.
    """
    for connection in _connections_to(peer):
        with connection, suppress(OSError):
            if connection.getsockname()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def ends_of(peer: str) -> list[tuple[Address, Address]]:
    """Our address and theirs of the TCP connection to `peer`, without the forms that IPv6 has for addresses of IPv4; none as above.

    A stranger may call from the port from which somebody else talks to another port of this process: then there are several.
    """
    found = []
    for connection in _connections_to(peer):
        with connection, suppress(OSError):
            found.append((_plain(*connection.getsockname()[:2]), _plain(*connection.getpeername()[:2])))
    return found


def _connections_to(peer: str) -> Iterator[socket.socket]:
    """Copies of them that are to be closed."""
    address = address_of(peer)
    return filter(None, (_if_to(fd, address) for fd in _descriptors()))


def _descriptors() -> list[int]:
    """Those that are open; none where the system does not say it, or has none left to look with."""
    try:
        return [int(name) for name in os.listdir(_FILES)]
    except OSError:
        return []


def _if_to(fd: int, address: Address) -> socket.socket | None:
    if not _leads_to(fd, address):
        return None
    with suppress(OSError):
        connection = socket.socket(fileno=os.dup(fd))
        if _leads_to(connection.fileno(), address):  # still
            return connection
        connection.close()
    return None


def _leads_to(fd: int, address: Address) -> bool:
    connection = None
    try:
        connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=fd)  # as above
        peer = connection.getpeername()
        return isinstance(peer, tuple) and peer[1] == address[1] and _plain(*peer[:2]) == address
    except (OSError, ValueError):
        return False  # no connection of TCP, or closed meanwhile
    finally:
        if connection is not None:
            connection.detach()


def _plain(host: str, port: int) -> Address:
    return _plain_host(host), port


@lru_cache(maxsize=_KNOWN)
def _plain_host(host: str) -> str:
    """One and the same for an address of IPv4, and for it on a socket of IPv6."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
