"""Pings of clients without calls: at a sane pace they are welcome, a flood is refused. Frames of HTTP/2 as in RFC 9113."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tests.support.servers import Running

_PING, _GOAWAY, _SETTINGS, _ACK = 6, 7, 4, 1
_ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, 0) + payload


class Stranger:
    """An HTTP/2 connection that asks nothing."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(_SETTINGS))

    def ping(self, count: int) -> None:
        self.writer.write(frame(_PING, bytes(8)) * count)

    async def answer(self) -> tuple[int, bytes]:
        """The next acknowledged ping or GOAWAY: kind and payload."""
        while True:
            header = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(header[:3]))
            kind, flags = header[3], header[4]
            if kind == _GOAWAY or (kind == _PING and flags & _ACK):
                return kind, payload
            if kind == _PING:
                self.writer.write(frame(_PING, payload, _ACK))


@pytest.fixture
async def stranger(running: Running) -> Stranger:
    return Stranger(*await asyncio.open_connection("127.0.0.1", running.port))


async def test_an_idle_client_may_ping(stranger: Stranger) -> None:
    """More often than the ten seconds that clients may choose; each is a strike where idle clients may not ping, and three are too many."""
    for _ in range(4):
        await asyncio.sleep(1.1)
        stranger.ping(1)
        assert (await stranger.answer())[0] == _PING
    stranger.writer.close()


async def test_a_flood_of_pings_is_refused(stranger: Stranger) -> None:
    stranger.ping(100)
    while (answer := await stranger.answer())[0] == _PING:
        pass
    assert answer == (_GOAWAY, bytes(4) + struct.pack(">I", _ENHANCE_YOUR_CALM) + b"too_many_pings")
    stranger.writer.close()
