"""Ending a connection that gRPC has accepted: it has no call for that, but its sockets are files of this process."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from moeserve.addresses import parse_target
from moeserve.errors import ConfigError

_FILES: Final = Path("/proc/self/fd")
_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)


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


def _plain(host: str, port: int) -> tuple[str, int]:
    """One and the same for an address of IPv4, and for it on a socket of IPv6."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address), port
