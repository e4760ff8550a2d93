"""The messages between a frontend and an expert host, byte by byte: little-endian structs and raw tensors, never pickle.

R rows, H hidden size, N (token, expert) pairs, D destinations (0 = the receiver alone).

Request area: hidden_states [R, H] dtype | row_index [N] int32 | local_experts [N] int32 | weights [N] float32
              | destinations [D, 2] uint32
Reply area:   partial [R, H] float32
Every section starts at a multiple of 64 bytes. Offsets follow from the counts on both sides, so none has to be believed.
A destination is a host's number and where its pairs end; the first is the receiver, which passes the others their share on.

A packet is a WORK header (56 bytes) or a note (16 bytes, some followed by a sentence; a REPLY to timed WORK by the times of its pass):
HELLO(version, arena bytes) -> ACCEPT(version, max_message_bytes) · WORK -> REPLY(id) | ERROR(gRPC status, id, sentence) · CANCEL(id)
· GOODBYE(sentence) · HEARTBEAT: the host is alive · LOADS(uses, reads): how often experts were in memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import grpc
import numpy as np
import torch

from moeserve.api.call_trace import PassTimes
from moeserve.api.tensors import FLOAT_DTYPES, WIRE_NUMBERS
from moeserve.errors import ExpertUnavailable, MoEServeError, from_status

VERSION = 4
MAX_SENTENCE_BYTES = 1024
#: kind, dtype, pass_on, is_timed, layer, id, epoch, timeout_us, rows, hidden_size, pairs, destinations, offset in the shared arena
_WORK = struct.Struct("<BBBBIQQQIIIIQ")
#: kind, code (protocol version or gRPC status), value (id or bytes)
_NOTE = struct.Struct("<BxHxxxxQ")
#: a note, and when the pass began and ended, nanoseconds on the host's clock
_TIMED_REPLY = struct.Struct("<BxHxxxxQQQ")
MAX_PACKET_BYTES = _NOTE.size + MAX_SENTENCE_BYTES
_ALIGNMENT = 64
_STATUS = {code.value[0]: code for code in grpc.StatusCode}

Memory = mmap.mmap | memoryview


class MalformedMessage(Exception):
    """A peer has broken the protocol of this file; its connection is closed."""


class Kind(IntEnum):
    """First byte of every packet."""

    HELLO = 1
    ACCEPT = 2
    WORK = 3
    REPLY = 4
    ERROR = 5
    CANCEL = 6
    GOODBYE = 7
    HEARTBEAT = 8
    LOADS = 9


class PassOn(IntEnum):
    """What the receiver of a message does with the pairs of other hosts."""

    NOTHING = 0  # there are none
    FAN_OUT = 1  # one message to each of them
    CHAIN = 2  # one message to the next, which passes on the rest


class PeerLost(ExpertUnavailable):
    """A host that was to pass rows on could not reach one of the others, or lost it: send to each of them directly."""

    code = grpc.StatusCode.ABORTED


class Destination(NamedTuple):
    """A host and the end of its pairs, which begin where those of the destination before it end."""

    host: int
    pair_end: int


_PASS_ON = {int(way): way for way in PassOn}
_ACTIVATION_DTYPES = {WIRE_NUMBERS[dtype]: dtype for dtype in FLOAT_DTYPES.values()}
_KINDS = {int(kind): kind for kind in Kind}


class WorkShape(NamedTuple):
    """Sizes of one message: hidden_states [rows, hidden_size] of `dtype`, and `pairs` (token, expert) pairs that read them.

    destinations: how many hosts it is for, 0 = the receiver alone.
    """

    rows: int
    hidden_size: int
    pairs: int
    dtype: torch.dtype
    destinations: int = 0


class PacketLayout(NamedTuple):
    """Where the sections lie, in bytes from the start of the block."""

    row_index: int
    local_experts: int
    weights: int
    destinations: int
    request_bytes: int
    reply: int
    total_bytes: int


class Sections(NamedTuple):
    """hidden_states [R, H] dtype, row_index [N] int32, local_experts [N] int32, weights [N] float32: views of a request area."""

    hidden_states: torch.Tensor
    row_index: torch.Tensor
    local_experts: torch.Tensor
    weights: torch.Tensor


class WorkHeader(NamedTuple):
    """What a WORK packet says about the block that belongs to it."""

    id: int
    layer: int
    epoch: int
    timeout_us: int
    shape: WorkShape
    offset: int
    pass_on: PassOn = PassOn.NOTHING
    is_timed: bool = False


class BareMessage(NamedTuple):
    """Any other packet."""

    kind: Kind
    code: int
    value: int
    sentence: str
    times: PassTimes | None = None

    def error(self) -> MoEServeError:
        """The error the host raised, rebuilt from an ERROR note."""
        if self.code not in _STATUS:
            raise MalformedMessage(f"error with unknown status {self.code}")
        if _STATUS[self.code] is PeerLost.code:
            return PeerLost(self.sentence)
        return from_status(_STATUS[self.code], self.sentence)


def layout_of(shape: WorkShape) -> PacketLayout:
    """Offsets and sizes of the sections of a message of this shape."""
    numel = shape.rows * shape.hidden_size
    row_index = _rounded_up(numel * shape.dtype.itemsize)
    local_experts = row_index + _rounded_up(shape.pairs * 4)
    weights = local_experts + _rounded_up(shape.pairs * 4)
    destinations = weights + shape.pairs * 4
    if shape.destinations:
        destinations = _rounded_up(destinations)
    request_bytes = destinations + shape.destinations * 8
    reply = _rounded_up(request_bytes)
    return PacketLayout(row_index, local_experts, weights, destinations, request_bytes, reply, reply + numel * 4)


def sections(memory: Memory, shape: WorkShape, layout: PacketLayout, offset: int = 0) -> Sections:
    """The four sections of the request area that starts at `offset` of `memory`, without a copy."""
    rows, hidden_size, pairs = shape.rows, shape.hidden_size, shape.pairs
    return Sections(
        torch.frombuffer(memory, dtype=shape.dtype, count=rows * hidden_size, offset=offset).view(rows, hidden_size),
        torch.frombuffer(memory, dtype=torch.int32, count=pairs, offset=offset + layout.row_index),
        torch.frombuffer(memory, dtype=torch.int32, count=pairs, offset=offset + layout.local_experts),
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


def write_destinations(memory: Memory, layout: PacketLayout, destinations: Sequence[Destination]) -> None:
    """Fills the section of a message to several hosts."""
    np.frombuffer(memory, np.uint32, 2 * len(destinations), layout.destinations).reshape(-1, 2)[:] = destinations


def read_destinations(memory: Memory, shape: WorkShape, layout: PacketLayout, offset: int = 0) -> tuple[Destination, ...]:
    """Raises MalformedMessage unless hosts differ, each has at least one pair, and together they have all."""
    section = np.frombuffer(memory, dtype=np.uint32, count=2 * shape.destinations, offset=offset + layout.destinations)
    destinations = tuple(Destination(host, end) for host, end in section.reshape(-1, 2).tolist())
    ends = [0, *(end for _, end in destinations)]
    if len({host for host, _ in destinations}) < len(destinations):
        raise MalformedMessage("a host is named twice among the destinations")
    if ends[-1] != shape.pairs or any(end <= start for start, end in pairwise(ends)):
        raise MalformedMessage("destinations do not share out the pairs of their message")
    return destinations


def check_indices(
    memory: Memory, shape: WorkShape, layout: PacketLayout, offset: int = 0, destinations: Sequence[Destination] = ()
) -> None:
    """Raises MalformedMessage unless row_index lies in 0..R-1 and local experts are not negative and ascend, for each destination anew.

    Only the host knows how many it has, so it checks the last one.
    """
    # Read as unsigned, a negative number is a huge one: one bound instead of two.
    row_index = np.frombuffer(memory, dtype=np.uint32, count=shape.pairs, offset=offset + layout.row_index)
    if np.maximum.reduce(row_index) >= shape.rows:
        raise MalformedMessage("row_index points outside the rows of its message")
    local_experts = np.frombuffer(memory, dtype=np.int32, count=shape.pairs, offset=offset + layout.local_experts)
    falls = local_experts[1:] < local_experts[:-1]
    if destinations:
        begins = [end for _, end in destinations[:-1]]
        falls[np.subtract(begins, 1)] = local_experts[begins] < 0
    if local_experts[0] < 0 or np.count_nonzero(falls):
        raise MalformedMessage("local experts are negative or not sorted")


def kind_of(packet: bytes) -> Kind:
    """Raises MalformedMessage for an empty packet or an unknown kind."""
    kind = _KINDS.get(packet[0]) if packet else None
    if kind is None:
        raise MalformedMessage("packet of unknown kind")
    return kind


def pack_work(header: WorkHeader) -> bytes:
    """A WORK packet; the receiver finds the block at `header.offset`."""
    shape = header.shape
    number = WIRE_NUMBERS[shape.dtype]
    sizes = (shape.rows, shape.hidden_size, shape.pairs, shape.destinations)
    kinds = (Kind.WORK, number, header.pass_on, header.is_timed)
    return _WORK.pack(*kinds, header.layer, header.id, header.epoch, header.timeout_us, *sizes, header.offset)


def unpack_work(packet: bytes) -> WorkHeader:
    """Raises MalformedMessage unless sizes are positive, the dtype is one of activations, and what is passed on has somewhere to go."""
    if len(packet) != _WORK.size:
        raise MalformedMessage(f"work header of {len(packet)} bytes")
    _, number, way, timed, layer, work_id, epoch, timeout_us, rows, hidden_size, pairs, destinations, offset = _WORK.unpack(packet)
    dtype = _ACTIVATION_DTYPES.get(number)
    if dtype is None:
        raise MalformedMessage(f"dtype number {number} is not one of activations")
    if not (rows and hidden_size and pairs):
        raise MalformedMessage(f"empty work: {rows} rows of {hidden_size}, {pairs} pairs")
    pass_on = _PASS_ON.get(way)
    if pass_on is None or (destinations > 1) != (pass_on is not PassOn.NOTHING) or destinations == 1 or destinations > pairs:
        raise MalformedMessage(f"{pairs} pairs for {destinations} destinations, to be passed on in way {way}")
    shape = WorkShape(rows, hidden_size, pairs, dtype, destinations)
    return WorkHeader(work_id, layer, epoch, timeout_us, shape, offset, pass_on, timed != 0)


def pack_note(kind: Kind, *, code: int = 0, value: int = 0, sentence: str = "") -> bytes:
    """A packet of any other kind; a sentence that is too long is cut."""
    return _NOTE.pack(kind, code, value) + sentence.encode()[:MAX_SENTENCE_BYTES]


def pack_reply(work_id: int, times: PassTimes | None) -> bytes:
    """The REPLY note of a work; `times` if it was timed."""
    return pack_note(Kind.REPLY, value=work_id) if times is None else _TIMED_REPLY.pack(Kind.REPLY, 0, work_id, *times)


def pack_error(work_id: int, error: MoEServeError) -> bytes:
    """The ERROR note that makes the other side raise the same class with the same sentence."""
    return pack_note(Kind.ERROR, code=error.code.value[0], value=work_id, sentence=str(error))


def unpack_note(packet: bytes) -> BareMessage:
    """Raises MalformedMessage unless the size fits the kind."""
    kind = kind_of(packet)
    if kind is Kind.REPLY and len(packet) == _TIMED_REPLY.size:
        _, code, value, *times = _TIMED_REPLY.unpack(packet)
        return BareMessage(kind, code, value, "", PassTimes(*times))
    may_talk = kind in (Kind.ERROR, Kind.GOODBYE)
    if kind is Kind.WORK or not _NOTE.size <= len(packet) <= (MAX_PACKET_BYTES if may_talk else _NOTE.size):
        raise MalformedMessage(f"{kind.name} packet of {len(packet)} bytes")
    _, code, value = _NOTE.unpack_from(packet)
    return BareMessage(kind, code, value, packet[_NOTE.size :].decode(errors="replace"))


def _rounded_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
