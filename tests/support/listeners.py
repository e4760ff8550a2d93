"""Sockets that are no service: one that takes connections, a wire between a client and a server."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Listener:
    """At `target`. Every connection gets `answer` for its first line, and is ended; `asked` keeps these lines."""

    def __init__(self, answer: bytes) -> None:
        self.asked: list[str] = []
        self._answer, self._socket = answer, socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, suppress(OSError), connection.makefile("rb") as lines:
                first = lines.readline().decode()
                if first == "end\n":
                    return
                self.asked.append(first)
                connection.sendall(self._answer)

    def stop(self) -> None:
        with socket.create_connection(self._socket.getsockname()) as last:
            last.sendall(b"end\n")
        self._thread.join()
        self._socket.close()


@contextmanager
def listener(answer: bytes = b"") -> Iterator[Listener]:
    listening = Listener(answer)
    try:
        yield listening
    finally:
        listening.stop()


class Wire:
    """Between a client and a server on this machine: passes on what they say until it is `cut`, and then says nothing to either.

    Of what a connection says to the server, at most `most_bytes` are passed on.
    """

    def __init__(self, target: str, most_bytes: float = math.inf) -> None:
        host, _, port = target.rpartition(":")
        self._server, self._listening = (host, int(port)), socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._sockets, self._most_bytes = [self._listening], most_bytes
        self._is_cut = threading.Event()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._sockets.append(here := self._listening.accept()[0])
                self._sockets.append(there := socket.create_connection(self._server))
                for one, other, most_bytes in ((here, there, self._most_bytes), (there, here, math.inf)):
                    threading.Thread(target=self._pass_on, args=(one, other, most_bytes), daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket, most_bytes: float) -> None:
        with suppress(OSError):
            while said := here.recv(2**16):
                if not self._is_cut.is_set() and most_bytes > 0:
                    there.sendall(said)
                    most_bytes -= len(said)

    def cut(self) -> None:
        """As when a machine vanishes: nobody is told."""
        self._is_cut.set()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
