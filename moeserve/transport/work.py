"""One message as the host sees it, and the way its answer goes back.

R rows, H hidden size, N (token, expert) pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from moeserve.api.call_trace import PassTimes
from moeserve.errors import Cancelled, DeadlineExceeded, MoEServeError
from moeserve.transport.wire import Destination, PacketLayout, Sections, WorkHeader


class Answerer(Protocol):
    """The connection a work came over."""

    def reply_buffer(self, work: Work) -> torch.Tensor:
        """[R, H] float32 to write the answer to. Raises Overloaded when there is no room."""
        ...

    def reply(self, work: Work, partial: torch.Tensor) -> None:
        """Sends what was written."""
        ...

    def fail(self, work: Work, error: MoEServeError) -> None:
        """Sends the error in place of an answer."""
        ...


class Work:
    """Rows for the experts of one layer. Answer each exactly once, with `reply` or `fail`, also when it was cancelled.

    hidden_states [R, H]  float32, float16 or bfloat16
    row_index     [N]     int32, the row each (token, expert) pair reads, in 0..R-1
    local_experts [N]     int32, the local expert of each pair, ascending; that they exist is for the host to check
    weights       [N]     float32
    All are views of the message, valid until the answer. Pairs that are to be passed on to other hosts are not among these N:
    they follow in `request`, shared out as `destinations` says (empty = nothing is to be passed on; the first is the receiver).

    `deadline` is a time on this machine's monotonic clock, in seconds. To be used by the thread that polls.
    """

    def __init__(
        self, header: WorkHeader, layout: PacketLayout, request: Sections, destinations: tuple[Destination, ...], answerer: Answerer
    ) -> None:
        self.id = header.id
        self.epoch = header.epoch
        self.layer = header.layer
        self.header = header
        self.layout = layout
        self.request = request
        self.destinations = destinations
        self.hidden_states, self.row_index, self.local_experts, self.weights = request
        if destinations:
            self.row_index, self.local_experts, self.weights = (section[: destinations[0].pair_end] for section in request[1:])
        self.deadline = time.monotonic() + header.timeout_us / 1e6
        self.is_cancelled = False
        #: of the pass that has computed it
        self.times: PassTimes | None = None
        #: called when the work is cancelled while others help with it
        self.on_cancel: Callable[[], None] | None = None
        self._answerer = answerer
        self._partial: torch.Tensor | None = None
        self._answered = False

    @property
    def is_expired(self) -> bool:
        """Whether its deadline has passed."""
        return time.monotonic() >= self.deadline

    def reply_buffer(self) -> torch.Tensor:
        """Where to write the answer: [R, H] float32, not zeroed. Raises Overloaded when replies under way fill the pool."""
        if self._partial is None:
            self._partial = self._answerer.reply_buffer(self)
        return self._partial

    def reply(self) -> None:
        """Sends what was written to `reply_buffer()`; never blocks, and does nothing when the frontend is gone."""
        assert self._partial is not None and not self._answered, "reply() follows reply_buffer(), once"
        self._answered = True
        self._answerer.reply(self, self._partial)
        self._partial = None

    def fail(self, error: MoEServeError) -> None:
        """The frontend's future raises the same class with the same sentence."""
        assert not self._answered, "a work is answered once"
        self._answered = True
        self._answerer.fail(self, error)

    def cancel(self) -> None:
        """Cancels the work: the frontend does not wait for the answer any more."""
        self.is_cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    def drop_if_late(self) -> bool:
        """Answers the work with an error, and returns True, if it was cancelled or its deadline has passed."""
        if self.is_cancelled:
            self.fail(Cancelled("the frontend cancelled this work"))
        elif self.is_expired:
            self.fail(DeadlineExceeded("the deadline passed before the host could begin"))
        return self._answered
