"""Frames of HTTP/2 by hand, for what no client of gRPC would do (RFC 9113, RFC 7541)."""

from __future__ import annotations

_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: the setting of how many bytes of a stream may be sent: none
_NO_WINDOW = (4).to_bytes(2, "big") + bytes(4)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """One header in full, without a table and without Huffman (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call_that_takes_nothing(method: str, message: bytes) -> bytes:
    """All that a client sends for one call, on a connection that gives answers no room."""
    headers = {b":method": b"POST", b":scheme": b"http", b":path": method.encode(), b":authority": b"a"}
    more = {b"te": b"trailers", b"content-type": b"application/grpc"}
    packed = b"".join(_literal(name, value) for name, value in (headers | more).items())
    data = bytes(1) + len(message).to_bytes(4, "big") + message
    frames = [frame(_SETTINGS, 0, 0, _NO_WINDOW), frame(_HEADERS, _END_HEADERS, 1, packed), frame(_DATA, _END_STREAM, 1, data)]
    return _PREFACE + b"".join(frames)
