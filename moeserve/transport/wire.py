"""The messages between a frontend and an expert host, byte by byte: little-endian structs and raw tensors, never pickle.

R rows, H hidden size, N (token, expert) pairs.

Request area: hidden_states [R, H] dtype | row_index [N] int32 | slots [N] int32 | weights [N] float32
Reply area:   partial [R, H] float32
Every section starts at a multiple of 64 bytes. Offsets follow from the counts on both sides, so none has to be believed.

A packet is a WORK header (56 bytes) or a note (16 bytes, some followed by a sentence):
HELLO(version, arena bytes) -> WELCOME(version, max_message_bytes) · WORK -> REPLY(id) | ERROR(gRPC status, id, sentence) · CANCEL(id)
· GOODBYE(sentence).
"""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum
from typing import NamedTuple

import grpc
import numpy as np
import torch

from moeserve.errors import MoEServeError, from_status
from moeserve.tensors import FLOAT_DTYPES, WIRE_NUMBERS

VERSION = 1
MAX_SENTENCE_BYTES = 1024
#: kind, dtype, layer, id, epoch, timeout_us, rows, hidden_size, pairs, offset of the block in the shared arena
_WORK = struct.Struct("<BBxxIQQQIIIxxxxQ")
#: kind, code (protocol version or gRPC status), value (id or bytes)
_NOTE = struct.Struct("<BxHxxxxQ")
MAX_PACKET_BYTES = _NOTE.size + MAX_SENTENCE_BYTES
_ALIGNMENT = 64
_STATUS = {code.value[0]: code for code in grpc.StatusCode}

Memory = mmap.mmap | memoryview


class MalformedMessage(Exception):
    """A peer does not keep to this file; its connection is closed."""


class Kind(IntEnum):
    """First byte of every packet."""

    HELLO = 1
    WELCOME = 2
    WORK = 3
    REPLY = 4
    ERROR = 5
    CANCEL = 6
    GOODBYE = 7


_ACTIVATION_DTYPES = {WIRE_NUMBERS[dtype]: dtype for dtype in FLOAT_DTYPES.values()}
_KINDS = {int(kind): kind for kind in Kind}


class WorkShape(NamedTuple):
    """Sizes of one message: hidden_states [rows, hidden_size] of `dtype`, and `pairs` (token, expert) pairs that read them."""

    rows: int
    hidden_size: int
    pairs: int
    dtype: torch.dtype


class Layout(NamedTuple):
    """Where the sections lie, in bytes from the start of the block."""

    row_index: int
    slots: int
    weights: int
    request_bytes: int
    reply: int
    total_bytes: int


class Sections(NamedTuple):
    """hidden_states [R, H] dtype, row_index [N] int32, slots [N] int32, weights [N] float32: views of a request area."""

    hidden_states: torch.Tensor
    row_index: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


class WorkHeader(NamedTuple):
    """What a WORK packet says about the block that belongs to it."""

    id: int
    layer: int
    epoch: int
    timeout_us: int
    shape: WorkShape
    offset: int


class Note(NamedTuple):
    """Any other packet."""

    kind: Kind
    code: int
    value: int
    sentence: str

    def error(self) -> MoEServeError:
        """The error the host raised, rebuilt from an ERROR note."""
        if self.code not in _STATUS:
            raise MalformedMessage(f"error with unknown status {self.code}")
        return from_status(_STATUS[self.code], self.sentence)


def layout_of(shape: WorkShape) -> Layout:
    """Offsets and sizes of the sections of a message of this shape."""
    numel = shape.rows * shape.hidden_size
    row_index = _rounded_up(numel * shape.dtype.itemsize)
    slots = row_index + _rounded_up(shape.pairs * 4)
    weights = slots + _rounded_up(shape.pairs * 4)
    request_bytes = weights + shape.pairs * 4
    reply = _rounded_up(request_bytes)
    return Layout(row_index, slots, weights, request_bytes, reply, reply + numel * 4)


def sections(memory: Memory, shape: WorkShape, layout: Layout, offset: int = 0) -> Sections:
    """The four sections of the request area that starts at `offset` of `memory`, without a copy."""
    rows, hidden_size, pairs = shape.rows, shape.hidden_size, shape.pairs
    return Sections(
        torch.frombuffer(memory, dtype=shape.dtype, count=rows * hidden_size, offset=offset).view(rows, hidden_size),
        torch.frombuffer(memory, dtype=torch.int32, count=pairs, offset=offset + layout.row_index),
        torch.frombuffer(memory, dtype=torch.int32, count=pairs, offset=offset + layout.slots),
        torch.frombuffer(memory, dtype=torch.float32, count=pairs, offset=offset + layout.weights),
    )


def partial(memory: Memory, shape: WorkShape, offset: int) -> torch.Tensor:
    """The reply area [R, H] float32 that starts at `offset` of `memory`, without a copy."""
    count = shape.rows * shape.hidden_size
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=offset).view(shape.rows, shape.hidden_size)


def aligned(memory: memoryview) -> memoryview:
    """`memory`, or a copy where its elements would start at odd addresses, as in small messages that libzmq received together."""
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data if len(memory) else 0
    return memoryview(bytearray(memory)) if address % 4 else memory


def check_indices(memory: Memory, shape: WorkShape, layout: Layout, offset: int = 0) -> None:
    """Raises MalformedMessage unless row_index lies in 0..R-1 and slots are not negative and ascend.

    How many slots there are only the host knows: the last one is its to check.
    """
    # Read as unsigned, a negative number is a huge one: one bound instead of two.
    row_index = np.frombuffer(memory, dtype=np.uint32, count=shape.pairs, offset=offset + layout.row_index)
    if np.maximum.reduce(row_index) >= shape.rows:
        raise MalformedMessage("row_index points outside the rows of its message")
    slots = np.frombuffer(memory, dtype=np.int32, count=shape.pairs, offset=offset + layout.slots)
    if slots[0] < 0 or np.count_nonzero(slots[1:] < slots[:-1]):
        raise MalformedMessage("slots are negative or not sorted")


def kind_of(packet: bytes) -> Kind:
    """Raises MalformedMessage for an empty packet or an unknown kind."""
    kind = _KINDS.get(packet[0]) if packet else None
    if kind is None:
        raise MalformedMessage("packet of unknown kind")
    return kind


def pack_work(header: WorkHeader) -> bytes:
    shape = header.shape
    number = WIRE_NUMBERS[shape.dtype]
    sizes = (shape.rows, shape.hidden_size, shape.pairs)
    return _WORK.pack(Kind.WORK, number, header.layer, header.id, header.epoch, header.timeout_us, *sizes, header.offset)


def unpack_work(packet: bytes) -> WorkHeader:
    """Raises MalformedMessage unless sizes are positive and the dtype is one of activations."""
    if len(packet) != _WORK.size:
        raise MalformedMessage(f"work header of {len(packet)} bytes")
    _, number, layer, work_id, epoch, timeout_us, rows, hidden_size, pairs, offset = _WORK.unpack(packet)
    dtype = _ACTIVATION_DTYPES.get(number)
    if dtype is None:
        raise MalformedMessage(f"dtype number {number} is not one of activations")
    if not (rows and hidden_size and pairs):
        raise MalformedMessage(f"empty work: {rows} rows of {hidden_size}, {pairs} pairs")
    return WorkHeader(work_id, layer, epoch, timeout_us, WorkShape(rows, hidden_size, pairs, dtype), offset)


def pack_note(kind: Kind, *, code: int = 0, value: int = 0, sentence: str = "") -> bytes:
    return _NOTE.pack(kind, code, value) + sentence.encode()[:MAX_SENTENCE_BYTES]


def pack_error(work_id: int, error: MoEServeError) -> bytes:
    """The ERROR note that makes the other side raise the same class with the same sentence."""
    return pack_note(Kind.ERROR, code=error.code.value[0], value=work_id, sentence=str(error))


def unpack_note(packet: bytes) -> Note:
    """Raises MalformedMessage unless the size fits the kind."""
    kind = kind_of(packet)
    may_talk = kind in (Kind.ERROR, Kind.GOODBYE)
    if kind is Kind.WORK or not _NOTE.size <= len(packet) <= (MAX_PACKET_BYTES if may_talk else _NOTE.size):
        raise MalformedMessage(f"{kind.name} packet of {len(packet)} bytes")
    _, code, value = _NOTE.unpack_from(packet)
    return Note(kind, code, value, packet[_NOTE.size :].decode(errors="replace"))


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
