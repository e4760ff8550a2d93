"""A socket that takes connections and is no service."""

from __future__ import annotations

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
