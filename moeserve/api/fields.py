"""A message in two parts: its few small fields, and the data of the large tensors in it, which stays where it is."""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from moeserve.api.protobuf import LENGTH, MAX_SMALL_BYTES, scan, tag, varint
from moeserve.errors import InvalidRequest
from moeserve.v1 import tensor_pb2

# Up to here protobuf's copies cost less than doing without them, and a tensor that is kept does not keep its whole message.
SMALL_TENSOR_BYTES: Final = 8 * 1024

DATA_KEY: Final = tag(tensor_pb2.Tensor.DATA_FIELD_NUMBER)

#: the field of an InvalidRequest about memory that this process does not know: the request is right otherwise
SHARED: Final = "shared"


def split(message: bytes, tensor_fields: Container[int]) -> tuple[bytes, dict[int, memoryview]]:
    """The message without the data of its large tensors, and that data by field number (the last one of several)."""
    whole = memoryview(message)
    small: list[bytes | memoryview] = []
    data: dict[int, memoryview] = {}
    for key, start, body, end in scan(message, 0, len(message)):
        number = key >> 3
        if key & 7 != LENGTH or number not in tensor_fields:
            small.append(whole[start:end])
            continue
        rest: list[memoryview] = []
        for inner_key, inner_start, inner_body, inner_end in scan(message, body, end):
            is_data = inner_key == DATA_KEY[0]
            if is_data and inner_end - inner_body > SMALL_TENSOR_BYTES:
                data[number] = whole[inner_body:inner_end]
                continue
            if is_data:
                data.pop(number, None)
            rest.append(whole[inner_start:inner_end])
        small += (tag(number), varint(sum(map(len, rest))), *rest)
    if sum(map(len, small)) > MAX_SMALL_BYTES:
        raise InvalidRequest(f"the message has more than {MAX_SMALL_BYTES} bytes beside tensor data")
    return b"".join(small), data
