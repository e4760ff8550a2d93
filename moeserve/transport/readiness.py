"""When a ZeroMQ socket has a message.

libzmq's file descriptor signals that something changed, once, and not that a message waits; sending may swallow the signal.
So callers that wait on the descriptor check here before the first wait and after each send.
"""

from __future__ import annotations

from typing import Any

import zmq


def has_message(sock: zmq.Socket[Any]) -> bool:
    """Whether `sock` can be read from now; the check also lets libzmq process what its own thread has received."""
    return bool(int(sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
