"""A name server of the test's own, for the targets dns://127.0.0.1:PORT/NAME:PORT that gRPC knows. Messages as in RFC 1035."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_A, _IN, _NO_SUCH_NAME = 1, 1, 3


_NAME: Final = "frontends.test"


class Names:
    """`addresses` (IPv4) is what its one name stands for from now on; none = there is no such name. `asked`: how often it was."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def target(self, port: int) -> str:
        """What a client calls."""
        return f"dns://127.0.0.1:{self._socket.getsockname()[1]}/{_NAME}:{port}"

    def _serve(self) -> None:
        while True:
            query, asker = self._socket.recvfrom(512)
            if not query:
                return
            self._socket.sendto(self._answer(query), asker)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(0, 12) + 5  # a name of labels, its type and class
        (kind,) = struct.unpack(">H", query[end - 4 : end - 2])
        is_ours = query[12 : end - 4] == b"".join(bytes([len(label)]) + label.encode() for label in (*_NAME.split("."), ""))
        found = self.addresses if is_ours and kind == _A else ()
        self.asked += is_ours and kind == _A
        flags = 0x8180 | (0 if is_ours and self.addresses else _NO_SUCH_NAME)
        records = [struct.pack(">HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(address) for address in found]
        return query[:2] + struct.pack(">HHHHH", flags, 1, len(records), 0, 0) + query[12:end] + b"".join(records)

    def stop(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@contextmanager
def names(*addresses: str) -> Iterator[Names]:
    """As `Names`."""
    server = Names(*addresses)
    try:
        yield server
    finally:
        server.stop()
