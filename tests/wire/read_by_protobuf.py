"""Says what protobuf reads of the messages in a file, one line of JSON each.

Run by a test in a process of its own, where the environment chooses which of protobuf's parsers that is.

python read_by_protobuf.py FILE: every message is preceded by its name and length, as `struct` has it in HEADER.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from google.protobuf.internal import api_implementation
from google.protobuf.message import Message

from moeserve.v1 import moe_service_pb2 as pb

#: name of the message, its bytes
HEADER = struct.Struct("<16sI")


def what_is_in(message: Message) -> dict[str, object]:
    """Every field that is set, by name; data by its length and checksum."""
    found: dict[str, object] = {}
    for field, value in message.ListFields():
        if isinstance(value, Message):
            found[field.name] = what_is_in(value)
        elif isinstance(value, bytes):
            found[field.name] = [len(value), crc32(value)]
        else:
            found[field.name] = value if isinstance(value, str | float | int) else list(value)
    return found


def messages(data: bytes) -> Iterator[tuple[str, bytes]]:
    position = 0
    while position < len(data):
        name, length = HEADER.unpack_from(data, position)
        position += HEADER.size + length
        yield name.rstrip(b"\0").decode(), data[position - length : position]


if __name__ == "__main__":
    print(api_implementation.Type())
    for name, data in messages(Path(sys.argv[1]).read_bytes()):
        message = getattr(pb, name).FromString(data)
        print(json.dumps({"written_alike": message.SerializeToString() == data, "fields": what_is_in(message)}))
