"""Ports that stay free while nobody listens."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path


def kept_port() -> int:
    """A free one that the kernel gives to nobody who asks for any, as tests beside this one do all the time."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
