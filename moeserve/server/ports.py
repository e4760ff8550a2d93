"""Where a server listens: a port that is free at every address of a name. gRPC is content with any one of them."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from moeserve.addresses import join
from moeserve.config import ServerConfig
from moeserve.errors import ConfigError

#: of a name with several addresses, where a port that is free at one is taken at another
_TRIES: Final = 32


async def require_free_ports(config: ServerConfig) -> None:
    """Raises ConfigError when somebody listens already where `config` says: before anything is started that takes time."""
    for key in ("port", "metrics_port", "health_port"):
        if port := getattr(config, key):
            await free_port(config.host, port, "server.host", f"server.{key}")


async def free_port(host: str, port: int, host_key: str, port_key: str) -> int:
    """`port` if nobody listens there at any address of `host`; for 0 one that is free at all of them. Raises ConfigError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [(family, address) for family, _, _, _, address in found]
        if port == 0:
            return _port_free_at_all(addresses)
        bound = [_bind(family, address) for family, address in addresses]
        if not any(bound):
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return port
    except OSError as error:
        raise ConfigError(f"{host_key}, {port_key}: cannot listen on {join(host, port)}: {error.strerror}") from None


def _port_free_at_all(addresses: Sequence[tuple[int, Any]]) -> int:
    """0 where the system is to choose: there is one address."""
    for left in reversed(range(_TRIES if len(addresses) > 1 else 0)):
        port = 0
        try:
            for family, (host, _, *rest) in addresses:
                port = _bind(family, (host, port, *rest)) or port
            return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not left:
                raise
    return 0


def _bind(family: int, address: Any) -> int:
    """The port at which it was possible; 0: this machine does not support the protocol of `address`, which a name may have."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            return int(probe.getsockname()[1])
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return 0
