"""What the kernel knows of a TCP connection that libzmq owns: when the process at its other end was last heard of.

libzmq's own thread answers pings (ZMTP 3.1, RFC 37): a host that computes is heard of, one that is stopped or cut off is not. Pings that
are answered late because a large message is on its way are no silence, so libzmq's own time-outs are too short-sighted: bytes count here.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import suppress

#: struct tcp_info of linux/tcp.h up to tcpi_notsent_bytes: last_data_recv in ms, bytes_acked, bytes_received, notsent_bytes
_INFO = struct.Struct("=52xI64xQQ8xI")


class TcpLine:
    """A connection of its own descriptor, so that it cannot become another's while it is asked; to be closed. Raises OSError."""

    def __init__(self, fd: int) -> None:
        own = os.dup(fd)
        try:
            self._socket = socket.socket(fileno=own)
        except OSError:
            os.close(own)
            raise
        self._acked = 0

    def last_heard(self) -> float:
        """When bytes came last, or were taken while more waited; on the monotonic clock, in seconds.

        It is now where the kernel does not tell: a host is never silent then. A kernel acknowledges for a process that is stopped, too,
        until its buffer is full; so that counts only while more waits to be sent than fits there.
        """
        now = time.monotonic()
        with suppress(OSError):
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
            if len(info) == _INFO.size:
                since_ms, acked, received, waiting = _INFO.unpack(info)
                is_taking, self._acked = waiting > 0 and acked > self._acked, acked
                return now if is_taking or not received else now - since_ms / 1000
        return now

    def close(self) -> None:
        """Lets go of it; libzmq's own descriptor stays open."""
        self._socket.close()
