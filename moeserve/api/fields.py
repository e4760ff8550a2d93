"""Pieces of the protobuf wire format: the few fields of a message, and the data of the large tensors in it, which stays where it is."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Final

from moeserve.errors import InvalidRequest
from moeserve.v1 import tensor_pb2

# Bounds on what an untrusted sender may make us parse; our own have at most 13 fields, and 8 small tensors beside large data. Others may
# send every field in several pieces.
_MAX_FIELDS: Final = 64
MAX_SMALL_BYTES: Final = 128 * 1024
# Up to here protobuf's copies cost less than doing without them, and a tensor that is kept does not keep its whole message.
SMALL_TENSOR_BYTES: Final = 8 * 1024

_VARINT, _LENGTH, _GROUP_START, _GROUP_END = 0, 2, 3, 4
_FIXED_SIZES: Final = {1: 8, 5: 4, _GROUP_START: 0, _GROUP_END: 0}
_NOT_A_MESSAGE: Final = "the message is truncated or not a message of this service"
DATA_KEY: Final = bytes([tensor_pb2.Tensor.DATA_FIELD_NUMBER << 3 | _LENGTH])

#: the field of an InvalidRequest about memory that this process does not know: the request is right otherwise
SHARED: Final = "shared"


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def key_of(number: int) -> bytes:
    """In front of a field of that number with a length."""
    return varint(number << 3 | _LENGTH)


def split(message: bytes, tensor_fields: Container[int]) -> tuple[bytes, dict[int, memoryview]]:
    """The message without the data of its large tensors, and that data by field number (the last one of several)."""
    whole = memoryview(message)
    small: list[bytes | memoryview] = []
    data: dict[int, memoryview] = {}
    for key, start, body, end in _fields(message, 0, len(message)):
        number = key >> 3
        if key & 7 != _LENGTH or number not in tensor_fields:
            small.append(whole[start:end])
            continue
        rest: list[memoryview] = []
        for inner_key, inner_start, inner_body, inner_end in _fields(message, body, end):
            is_data = inner_key == DATA_KEY[0]
            if is_data and inner_end - inner_body > SMALL_TENSOR_BYTES:
                data[number] = whole[inner_body:inner_end]
                continue
            if is_data:
                data.pop(number, None)
            rest.append(whole[inner_start:inner_end])
        small += (key_of(number), varint(sum(map(len, rest))), *rest)
    if sum(map(len, small)) > MAX_SMALL_BYTES:
        raise InvalidRequest(f"the message has more than {MAX_SMALL_BYTES} bytes beside tensor data")
    return b"".join(small), data


def _fields(message: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Key, and start, start of the body and end of each field in `message[position:end]`; a group counts as one field, without a body."""
    depth, start = 0, position
    for _ in range(_MAX_FIELDS):
        if position == end and not depth:
            return
        key, position = _read_varint(message, position, 5)
        wire_type = key & 7
        body = position
        if wire_type == _LENGTH:
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
            yield key, start, body, position
            start = position
    raise InvalidRequest(_NOT_A_MESSAGE)


def _read_varint(message: bytes, position: int, max_bytes: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = shift = 0
    for byte in message[position : position + max_bytes]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise InvalidRequest(_NOT_A_MESSAGE)
