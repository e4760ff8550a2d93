"""Whose process is at the other end of a connection: Linux knows it of every socket of this machine."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from moeserve.addresses import parse_target
from moeserve.errors import ConfigError

_TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LOCAL_ADDRESS, _STATE, _UID = 1, 3, 7
_ESTABLISHED: Final = "01"


def is_same_user(peer: str) -> bool:
    """Whether `peer`, as gRPC calls it (ipv4:127.0.0.1:1234), is a process of this machine that runs as the user of this process.

    Only then a caller gains nothing by what this process may open.
    """
    with suppress(ConfigError, ValueError):
        ((host, port),) = parse_target(unquote(peer)).hosts
        address = ipaddress.ip_address(host)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        if (mapped or address).is_loopback:
            return set(_owners(mapped or address, port)) == {str(os.geteuid())}
    return False


def _owners(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Iterator[str]:
    """The users of all connections from there; more than one is one too many."""
    names = {_written(address, port)}
    if isinstance(address, ipaddress.IPv4Address):  # from a socket of IPv6, too
        names.add(_written(ipaddress.IPv6Address(f"::ffff:{address}"), port))
    for table in _TABLES:
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                columns = line.split()
                if columns[_LOCAL_ADDRESS] in names and columns[_STATE] == _ESTABLISHED:
                    yield columns[_UID]


def _written(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> str:
    """As the tables have it: words of four bytes, each the wrong way round."""
    packed = address.packed
    words = [packed[start : start + 4][::-1] for start in range(0, len(packed), 4)]
    return f"{b''.join(words).hex().upper()}:{port:04X}"
