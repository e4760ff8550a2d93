"""The other end of what floors are measured with, in a process of its own: a bare gRPC echo, and a bare socket that wakes a process up.

Started with the number of an inherited socket; prints the port of the echo; ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from typing import Any, Final

import grpc

from moeserve.allocator import keep_large_blocks

METHOD: Final = "/floor/Echo"
#: metadata: how many bytes to answer with, and when the message was here and the answer left, nanoseconds
REPLY_BYTES, TIMES = "reply-bytes", "times-ns"
_MOST_BYTES: Final = 2**30
UNBOUNDED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Echo(grpc.GenericRpcHandler):
    """Answers a message with as many bytes as the call asks for."""

    def __init__(self) -> None:
        self._answer = b""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The one method."""
        return grpc.unary_unary_rpc_method_handler(self._echo) if handler_call_details.method == METHOD else None

    async def _echo(self, _message: bytes, context: Any) -> bytes:
        began_ns = time.monotonic_ns()
        nbytes = min(int(dict(context.invocation_metadata()).get(REPLY_BYTES, 0)), _MOST_BYTES)
        if nbytes != len(self._answer):
            self._answer = bytes(nbytes)
        context.set_trailing_metadata(((TIMES, f"{began_ns},{time.monotonic_ns()}"),))
        return self._answer


def answer_pings(ours: socket.socket) -> None:
    """Answers every packet with the time when it was here, until the other end is closed."""
    while ours.recv(64):
        ours.send(time.monotonic_ns().to_bytes(8, "little"))


async def _main() -> None:
    keep_large_blocks()
    ours = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=answer_pings, args=(ours,), daemon=True).start()
    server = grpc.aio.server(options=UNBOUNDED)
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_main())
