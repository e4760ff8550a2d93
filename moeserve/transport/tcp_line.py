"""What the kernel knows of a TCP connection that libzmq owns: when the process at its other end was last heard of.

libzmq's own thread answers pings (ZMTP 3.1, RFC 37): a host that computes does, one that is stopped or cut off does not. A ping waits
behind a large message, and so does its answer, so a time-out of libzmq would end slow connections that work; here every byte counts.
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
    """A duplicate of the descriptor, which libzmq may close and reuse at any time; to be closed. Raises OSError."""

    def __init__(self, fd: int) -> None:
        own = os.dup(fd)
        try:
            self._socket = socket.socket(fileno=own)
        except OSError:
            os.close(own)
            raise
        self._acked = 0

    def last_heard(self) -> float:
        """When bytes were received, or were acknowledged while others waited to be sent; on the monotonic clock, in seconds.

        A host's kernel acknowledges for a stopped process, too, until its buffer is full, so acknowledgments count only while a large
        message is on its way. Where the kernel does not count bytes (gVisor), the answer is always now: no host is silent there.
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
