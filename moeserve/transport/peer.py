"""One frontend, seen from the host: the meaning of its packets, over any transport."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from moeserve.errors import MoEServeError
from moeserve.log_limit import limited_logger
from moeserve.transport.memory import Limits
from moeserve.transport.wire import (
    VERSION,
    Kind,
    MalformedMessage,
    Memory,
    PacketLayout,
    WorkHeader,
    check_indices,
    kind_of,
    layout_of,
    pack_error,
    pack_note,
    pack_reply,
    read_destinations,
    sections,
    unpack_note,
    unpack_work,
)
from moeserve.transport.work import Work

_strangers = limited_logger(__name__)


class Peer(ABC):
    """A connection to one frontend; appends its valid work to `arrived`."""

    def __init__(self, endpoint: str, limits: Limits, arrived: list[Work]) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._arrived = arrived
        self._unanswered: dict[int, Work] = {}
        self.is_gone = False

    @property
    def owes(self) -> bool:
        """Whether the frontend waits for an answer; from any thread."""
        return bool(self._unanswered)

    @abstractmethod
    def reply_buffer(self, work: Work) -> torch.Tensor:
        """[R, H] float32 to write the answer to."""

    def reply(self, work: Work, partial: torch.Tensor) -> None:
        """Sends the answer, unless the frontend is gone."""
        self._finish(work, pack_reply(work.id, work.times if work.header.is_timed else None), partial)

    def fail(self, work: Work, error: MoEServeError) -> None:
        """Sends the error in place of an answer, unless the frontend is gone."""
        self._finish(work, pack_error(work.id, error), None)

    @abstractmethod
    def _transmit(self, packet: bytes, partial: torch.Tensor | None) -> None:
        """Sends without blocking; disconnects if the frontend is gone."""

    @abstractmethod
    def _place(self, header: WorkHeader, layout: PacketLayout, body: Memory | None) -> tuple[Memory, int]:
        """Memory and offset of the request area. Raises MalformedMessage unless all of the message lies inside."""

    def _finish(self, work: Work, packet: bytes, partial: torch.Tensor | None) -> None:
        self._unanswered.pop(work.id, None)
        if not self.is_gone:
            self._transmit(packet, partial)

    def take_in(self, packet: bytes, body: Memory | None) -> None:
        """One packet after HELLO. Raises MalformedMessage."""
        kind = kind_of(packet)
        if kind is Kind.WORK:
            self._take_work(unpack_work(packet), body)
            return
        note = unpack_note(packet)
        if kind is not Kind.CANCEL:
            raise MalformedMessage(f"a frontend does not send {kind.name} here")
        # An unknown id was answered while the CANCEL was under way.
        if work := self._unanswered.get(note.value):
            work.cancel()

    def _take_work(self, header: WorkHeader, body: Memory | None) -> None:
        layout = layout_of(header.shape)
        if layout.total_bytes > self._limits.max_message_bytes:
            raise MalformedMessage(f"work of {layout.total_bytes} bytes; at most {self._limits.max_message_bytes} are allowed")
        if header.id in self._unanswered:
            raise MalformedMessage(f"id {header.id} is in use")
        memory, offset = self._place(header, layout, body)
        destinations = read_destinations(memory, header.shape, layout, offset) if header.shape.destinations else ()
        check_indices(memory, header.shape, layout, offset, destinations)
        work = Work(header, layout, sections(memory, header.shape, layout, offset), destinations, self)
        self._unanswered[work.id] = work
        self._arrived.append(work)

    def greet(self, packet: bytes) -> None:
        """Answers the first packet. Raises MalformedMessage unless it is a HELLO of this version."""
        hello = unpack_note(packet)
        if hello.kind is not Kind.HELLO or hello.code != VERSION:
            raise MalformedMessage(f"expected HELLO of protocol version {VERSION}, got {hello.kind.name} with {hello.code}")
        self._transmit(pack_note(Kind.ACCEPT, code=VERSION, value=self._limits.max_message_bytes), None)

    def refuse(self, reason: str) -> None:
        """Tells the frontend why it is disconnected."""
        _strangers.warning("disconnected a frontend at %s: %s", self._endpoint, reason)
        self._transmit(pack_note(Kind.GOODBYE, sentence=reason), None)

    def lose(self) -> None:
        """Cancels the works of a disconnected frontend; memory stays mapped while works refer to it."""
        self.is_gone = True
        for work in self._unanswered.values():
            work.cancel()
        self._unanswered.clear()
