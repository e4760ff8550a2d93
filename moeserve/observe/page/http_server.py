"""HTTP for a public port: one thread, few connections, a deadline for everything, one answer per connection.

A client's mistakes are answered or end its connection; they leave nothing in the log.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from moeserve.log_limit import limited_logger
from moeserve.loops import LoopThread
from moeserve.observe.page.http_request import MAX_HEAD_BYTES, Request, parse, read_head

MAX_CONNECTIONS: Final = 32
_REQUEST_TIMEOUT_S: Final = 10.0
#: until the caller has read the answer and closed the connection
_ANSWER_TIMEOUT_S: Final = 10.0
_MAX_UNREAD_BYTES: Final = 2**20
_LOOK_AGAIN_S: Final = 0.1

strangers: Final = limited_logger(__name__)


@dataclass(frozen=True)
class HttpAnswer:
    """`headers` beside those that every answer has."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpServer:
    """Listens from the moment it is made; `respond` is called in its thread. `headers` come with every answer.

    When all connections are taken, a new one takes the place of the oldest that is not being answered.
    Raises OSError when it cannot listen.
    """

    def __init__(self, host: str, port: int, respond: Callable[[Request], HttpAnswer], headers: Mapping[str, str]) -> None:
        self._respond, self._headers = respond, headers
        self._socket = _listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        #: the oldest first; whether its answer is on the way
        self._connections: dict[asyncio.StreamWriter, bool] = {}
        self._stopping = asyncio.Event()
        self._thread = LoopThread("moeserve-page")
        self._thread.start()
        self._serving = self._thread.submit(self._serve())

    def stop(self) -> None:
        """Stops listening."""
        if self._thread.is_running:
            self._thread.soon(self._stopping.set)
            self._serving.result()
            self._thread.stop()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_error)
        async with await asyncio.start_server(self._connected, sock=self._socket, limit=MAX_HEAD_BYTES):
            await self._stopping.wait()
            # asyncio loses connections that it has accepted when the server is closed before they are known.
            loop.remove_reader(self._socket)
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for writer in self._connections:
                    writer.transport.abort()
                await asyncio.wait(others, timeout=_LOOK_AGAIN_S)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._make_room()
        self._connections[writer] = False
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await read_head(reader)
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                if head:
                    await self._send(writer, self._answer(head))
                    await _read_the_rest(reader)
        except OSError:
            pass  # it was too slow, or has disconnected
        finally:
            writer.transport.abort()
            self._connections.pop(writer, None)

    def _make_room(self) -> None:
        if len(self._connections) < MAX_CONNECTIONS:
            return
        strangers.warning("all %d connections of the metrics port are taken: each new one ends the oldest", MAX_CONNECTIONS)
        idle = (writer for writer, is_answered in self._connections.items() if not is_answered)
        oldest = next(idle, next(iter(self._connections)))
        del self._connections[oldest]
        oldest.transport.abort()

    async def _send(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        writer.transport.set_write_buffer_limits(high=0)
        self._connections[writer] = True
        writer.write(answer)
        await writer.drain()
        self._connections[writer] = False
        writer.write_eof()

    def _answer(self, head: bytes) -> bytes:
        request = parse(head)
        if isinstance(request, Request):
            answer, has_body = self._respond_to(request), request.method != "HEAD"
        else:
            answer, has_body = HttpAnswer(request, f"{request.phrase}\n".encode()), True
        fixed = {"Content-Type": answer.content_type, "Content-Length": str(len(answer.body)), "Connection": "close"}
        headers = {**fixed, **answer.headers, **self._headers}
        lines = [f"HTTP/1.1 {answer.status.value} {answer.status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join((*lines, "", "")).encode("latin-1") + (answer.body if has_body else b"")

    def _respond_to(self, request: Request) -> HttpAnswer:
        try:
            return self._respond(request)
        except Exception as error:
            strangers.warning("the metrics port cannot answer", exc_info=error)
            return HttpAnswer(HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error; the service's log says more\n")

    def _on_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's handler: a broken connection is not logged, a failure to accept is."""
        if not isinstance(context.get("exception"), ConnectionError | TimeoutError):
            strangers.warning("the metrics port: %s (%s)", context["message"], context.get("exception"))


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


async def _read_the_rest(reader: asyncio.StreamReader) -> None:
    """Closing while something is unread would reset the connection, and the answer would be lost with it."""
    for _ in range(_MAX_UNREAD_BYTES // MAX_HEAD_BYTES):
        if not await reader.read(MAX_HEAD_BYTES):
            return
