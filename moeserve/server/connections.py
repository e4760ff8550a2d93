"""Connections that gRPC has accepted: how much they have brought, and ending one. It has no calls for that, but sockets are files."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import sys
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from moeserve.addresses import parse_target
from moeserve.errors import ConfigError

_FILES: Final = Path("/proc/self/fd")
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
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


def received_bytes(wanted: Collection[Address]) -> dict[Address, int]:
    """How many bytes each of the TCP connections of this process to `wanted` has brought, as far as the system says it."""
    found: dict[Address, int] = {}
    # The latest connections, which are asked for most often, have the highest numbers as a rule.
    for fd in sorted(map(int, os.listdir(_FILES)), reverse=True) if _FILES.exists() else ():
        if len(found) == len(wanted):
            break
        connection = None
        try:
            # As if of IPv6, whose addresses are the longest: asking what it is would cost as much again.
            connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, fileno=fd)
            peer = connection.getpeername()
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
            if len(info) == _BYTES_RECEIVED + 8 and (address := _plain(*peer[:2])) in wanted:
                found[address] = int.from_bytes(info[_BYTES_RECEIVED:], sys.byteorder)
        except (OSError, ValueError):
            pass  # no connection of TCP, or closed meanwhile
        finally:
            if connection is not None:
                connection.detach()
    return found


def hang_up(peer: str) -> bool:
    """Ends the TCP connection to `peer`, as gRPC calls it: ipv4:127.0.0.1:1234. Returns whether it was found; only Linux shows it."""
    with suppress(ConfigError):
        for host, port in parse_target(unquote(peer)).hosts:
            if _FILES.exists():
                return any(_end_if_to(int(name), host, port) for name in os.listdir(_FILES))
    return False


def _end_if_to(fd: int, host: str, port: int) -> bool:
    with suppress(OSError):
        own = os.dup(fd)
        if not stat.S_ISSOCK(os.fstat(own).st_mode):
            os.close(own)
            return False
        with socket.socket(fileno=own) as connection:
            if connection.family in _INTERNET and _plain(*connection.getpeername()[:2]) == _plain(host, port):
                connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _plain(host: str, port: int) -> Address:
    return _plain_host(host), port


@lru_cache(maxsize=_KNOWN)
def _plain_host(host: str) -> str:
    """One and the same for an address of IPv4, and for it on a socket of IPv6."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
