"""The fields of a message in the protobuf wire format, found and written without protobuf: tags, varints, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from moeserve.errors import InvalidRequest

#: bounds on what an untrusted sender may make us parse: fields of a message, and bytes of a message that protobuf may parse whole.
#: Our own have at most 13 fields, and 8 small tensors beside large data. Others may send every field in several pieces.
MAX_FIELDS: Final = 64
MAX_SMALL_BYTES: Final = 128 * 1024

Buffer: TypeAlias = bytes | memoryview

LENGTH: Final = 2
_VARINT, _GROUP_START, _GROUP_END = 0, 3, 4
_FIXED_SIZES: Final = {1: 8, 5: 4, _GROUP_START: 0, _GROUP_END: 0}
_NOT_A_MESSAGE: Final = "the message is truncated or not a message of this service"


def varint(value: int) -> bytes:
    """A number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int) -> bytes:
    """What stands in front of the length of a field."""
    return varint(number << 3 | LENGTH)


def length_delimited(number: int, *parts: Buffer) -> tuple[Buffer, ...]:
    """A field of the bytes of `parts`, in pieces that are to be joined."""
    return tag(number), varint(sum(map(len, parts))), *parts


def scan(message: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Tag, and start, start of the body and end of each field in `message[position:end]`; a group counts as one field, without a body.

    Raises InvalidRequest where there are too many, or none can be.
    """
    depth, start = 0, position
    for _ in range(MAX_FIELDS):
        if position == end and not depth:
            return
        tag, position = _read_varint(message, position, 5)
        wire_type = tag & 7
        body = position
        if wire_type == LENGTH:
            size, body = _read_varint(message, position, 5)
            position = body + size
        elif wire_type == _VARINT:
            position = _read_varint(message, position, 10)[1]
        else:
            position += _FIXED_SIZES.get(wire_type, len(message))
            depth += (wire_type == _GROUP_START) - (wire_type == _GROUP_END)
        if position > end or depth < 0:
            break
        if not depth:
            yield tag, start, body, position
            start = position
    raise InvalidRequest(_NOT_A_MESSAGE)


def _read_varint(message: Buffer, position: int, max_bytes: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = shift = 0
    for byte in message[position : position + max_bytes]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidRequest(_NOT_A_MESSAGE)
