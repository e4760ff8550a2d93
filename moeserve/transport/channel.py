"""The frontend's end: one channel per host, used from one asyncio loop.

R rows, H hidden size, N (token, expert) pairs.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moeserve.errors import ExpertUnavailable, InvalidRequest
from moeserve.kernels import write_message
from moeserve.memory import Arena, Block
from moeserve.transport.loads import Loads
from moeserve.transport.memory import Limits
from moeserve.transport.partial_future import Partial, PartialFuture
from moeserve.transport.silence import SilenceWatch
from moeserve.transport.timing import LONGEST_S
from moeserve.transport.wire import (
    VERSION,
    BareMessage,
    Destination,
    Kind,
    MalformedMessage,
    Memory,
    PacketLayout,
    PassOn,
    Sections,
    WorkHeader,
    WorkShape,
    layout_of,
    pack_note,
    pack_work,
    sections,
    unpack_note,
    write_destinations,
)


class ChannelClosed(ExpertUnavailable):
    """The host at the other end is gone, or this end was closed; connect again, to the host's new address."""


class HostSilent(ChannelClosed):
    """The host at the other end owes answers and sends nothing, not even heartbeats: it is stopped, or the network is cut."""


class Lease:
    """Memory for one message, to be written before `send`: it is what the host reads, so writing is the only copy.

    A message to several hosts is also addressed. A lease that is not sent gives its memory back when it is dropped.
    The answer to one that `is_timed` comes with the times of its pass.
    """

    __slots__ = ("block", "is_timed", "layout", "shape")

    def __init__(self, shape: WorkShape, layout: PacketLayout, block: Block) -> None:
        self.shape = shape
        self.layout = layout
        self.block = block
        self.is_timed = False

    def write(
        self, hidden_states: torch.Tensor, rows: torch.Tensor, row_index: torch.Tensor, local_experts: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """The `rows` [R] int64 of hidden_states [T, H] in the shape's dtype, and their pairs.

        row_index [N] int32 in 0..R-1, local_experts [N] int32 ascending, weights [N] float32.
        """
        pairs, at = (row_index, local_experts, weights), self.layout
        to = tuple(self.block.address + offset for offset in (0, at.row_index, at.local_experts, at.weights))
        if write_message(hidden_states, rows, pairs, to):
            return
        views = self.views
        torch.index_select(hidden_states, 0, rows, out=views.hidden_states)
        for view, values in zip(views[1:], pairs, strict=True):
            view.copy_(values)

    @property
    def views(self) -> Sections:
        """Of the memory that the host reads; to be dropped before `send`."""
        return sections(self.block.memory, self.shape, self.layout)

    def address(self, destinations: Sequence[Destination]) -> None:
        """Sets the destinations, as many as the shape has: the first one is the host at the other end of the channel."""
        assert len(destinations) == self.shape.destinations > 1, "a message to one host is not addressed"
        write_destinations(self.block.memory, self.layout, destinations)

    def take(self) -> Block:
        """Empties the lease, so that nothing can write to memory that the host reads."""
        block = self.block
        del self.block
        return block


class Pending(NamedTuple):
    """The channel's record of a message that the host has not answered yet."""

    future: PartialFuture
    shape: WorkShape
    layout: PacketLayout
    block: Block
    sent_at: float


class Channel(ABC):
    """Sends rows to one host. Only `lease` may be called from other threads."""

    def __init__(self, endpoint: str, arena: Arena, limits: Limits, silent_after_s: float) -> None:
        self.endpoint = endpoint
        self.closed = asyncio.Event()
        self._arena = arena
        self._max_message_bytes = limits.max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._unanswered: dict[int, Pending] = {}
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._reason, self._cause = "", ChannelClosed
        self._watch = SilenceWatch(silent_after_s)
        #: what the host has said of them, and when it did last, monotonic seconds
        self.loads, self.loaded_at = Loads(), 0.0
        self._heard_at = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether it was closed because the host was silent."""
        return self._cause is HostSilent

    def lease(self, shape: WorkShape) -> Lease:
        """Memory for a message of this shape and its answer.

        Raises InvalidRequest when it is larger than max_message_bytes, Overloaded when messages in flight fill the pool.
        """
        assert shape.rows > 0 and shape.hidden_size > 0 and shape.pairs > 0, "a message needs rows"
        layout = layout_of(shape)
        if layout.total_bytes > self._max_message_bytes:
            raise InvalidRequest(
                f"{shape.rows} rows and {shape.pairs} pairs take {layout.total_bytes} bytes; "
                f"max_message_bytes of the channel to {self.endpoint} is {self._max_message_bytes}"
            )
        return Lease(shape, layout, self._arena.lend(self._block_bytes(layout)))

    def send(self, lease: Lease, *, layer: int, epoch: int, timeout_s: float, pass_on: PassOn = PassOn.NOTHING) -> PartialFuture:
        """Sends a filled lease, which is not to be written to afterwards; never blocks.

        The future raises ChannelClosed as soon as the host is gone, HostSilent when it sends nothing any more, PeerLost when a host is
        gone that it passed rows on to, or the error that it answered with. A host that is alive and does not answer is found by the
        caller's own timeout only: cancel the future then, as `asyncio.wait_for` does.
        `timeout_s` is how long the host has until it may drop the work unanswered: with DeadlineExceeded.
        """
        work_id = next(self._ids)
        future = PartialFuture(work_id, self._cancelled, self._loop)
        if self.closed.is_set():
            future.set_exception(self._cause(self._reason))
            return future
        sent = Pending(future, lease.shape, lease.layout, lease.take(), time.monotonic())
        timeout_us = int(1e6 * min(max(0.0, timeout_s), LONGEST_S))
        header = WorkHeader(work_id, layer, epoch, timeout_us, sent.shape, sent.block.offset, pass_on, lease.is_timed)
        self._unanswered[work_id] = sent
        self._watch.start(self)
        self._transmit(pack_work(header), sent)
        return future

    async def close(self) -> None:
        """Closes the channel; outstanding answers raise ChannelClosed."""
        self._die(f"the channel to {self.endpoint} was closed")

    async def open(self, timeout_s: float) -> None:
        """Waits until the host accepts. Raises ChannelClosed if it does not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._accepted
        except TimeoutError:
            self._die(f"no host answered at {self.endpoint} within {timeout_s:g} s")
            raise ChannelClosed(self._reason) from None
        except asyncio.CancelledError:
            await self.close()
            raise

    def owed_since(self) -> float | None:
        """When the oldest unanswered message was sent; None = all are answered."""
        return next(iter(self._unanswered.values())).sent_at if self._unanswered else None

    def last_heard(self) -> float:
        """When the host sent something, on the monotonic clock in seconds."""
        return self._heard_at

    def owed_to_nobody(self) -> list[tuple[int, float]]:
        """Messages that were given up and that the host has not answered yet: their rows, and when they were sent, monotonic seconds."""
        return [(sent.shape.rows, sent.sent_at) for sent in self._unanswered.values() if sent.future.cancelled()]

    def fall_silent(self, silent_s: float) -> None:
        """Closes as if the host had disconnected."""
        self._die(f"the host at {self.endpoint} owes answers and has been silent for {silent_s:.2f} s", HostSilent)

    @abstractmethod
    def _block_bytes(self, layout: PacketLayout) -> int:
        """How much of a message's layout needs memory here."""

    @abstractmethod
    def _transmit(self, packet: bytes, sent: Pending | None) -> None:
        """Sends or queues; calls `_die` when the host is gone."""

    @abstractmethod
    def _partial(self, sent: Pending, body: Memory | None) -> torch.Tensor:
        """The answer to `sent`. Raises MalformedMessage when `body` does not fit."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Closes the connection."""

    def _take_in(self, packet: bytes, body: Memory | None) -> None:
        """One packet from the host."""
        self._heard_at = time.monotonic()
        try:
            note = unpack_note(packet)
            if note.kind is Kind.REPLY or note.kind is Kind.ERROR:
                self._answer(note, body)
            elif note.kind is Kind.HEARTBEAT:
                return
            elif note.kind is Kind.LOADS:
                self.loads, self.loaded_at = Loads.unpacked(note.value), self._heard_at
            elif note.kind is Kind.GOODBYE:
                self._die(f"the host at {self.endpoint} hung up: {note.sentence}")
            elif note.kind is Kind.ACCEPT and note.code == VERSION and not self._accepted.done():
                self._max_message_bytes = min(self._max_message_bytes, note.value)
                self._accepted.set_result(None)
            else:
                raise MalformedMessage(f"a host does not send {note.kind.name} here")
        except MalformedMessage as error:
            self._die(f"the host at {self.endpoint} broke the protocol: {error}")

    def _answer(self, note: BareMessage, body: Memory | None) -> None:
        sent = self._unanswered.get(note.value)
        if sent is None:
            raise MalformedMessage(f"answer to unknown id {note.value}")
        future = sent.future
        if note.kind is Kind.ERROR:
            error = note.error()
            del self._unanswered[note.value]
            if not future.done():
                future.set_exception(error)
        else:
            tensor = self._partial(sent, body)
            del self._unanswered[note.value]
            if not future.done():
                future.set_result(Partial(tensor, note.times))

    def _cancelled(self, work_id: int) -> None:
        if not self.closed.is_set():
            self._transmit(pack_note(Kind.CANCEL, value=work_id), None)

    def _die(self, reason: str, cause: type[ChannelClosed] = ChannelClosed) -> None:
        if self.closed.is_set():
            return
        self._reason, self._cause = reason, cause
        self.closed.set()
        self._watch.stop()
        self._hang_up()
        waiting: list[asyncio.Future[Any]] = [self._accepted, *(sent.future for sent in self._unanswered.values())]
        self._unanswered.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(cause(reason))
