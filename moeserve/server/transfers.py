"""Messages on their way in, answers on their way out: bytes that depend on how fast a stranger sends or reads.

gRPC tells neither how long a message will be nor how much of it has come. A message that is small, or comes fast, is there soon, and what
comes soon is bounded by the network; so the few that may take longer are what bounds the memory of those that have not come in full yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from moeserve.config import ServerConfig
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, Overloaded
from moeserve.log_limit import limited_logger
from moeserve.server.arriving import Arrival, Arriving
from moeserve.server.byte_budget import ByteBudget
from moeserve.server.connections import hang_up
from moeserve.server.rpc import Context, to_its_end

#: what takes longer to arrive is late
LATE_S: Final = 0.25
_LOOK_AGAIN_S: Final = 0.1

_strangers: Final = limited_logger(__name__)


class Transfers:
    """Of one server. What `watch` finds to be stuck is given up: a message that does not come, an answer that is not taken."""

    def __init__(self, config: ServerConfig) -> None:
        #: raises what refuses a call whatever its message brings, which is therefore not read
        self.refuse_early: Callable[[Context], None] = lambda context: None
        self.budget = ByteBudget(config.max_queued_bytes)
        self.arriving = Arriving(config, self.budget)
        #: messages that may be late at the same time: as many as would fill the budget once more
        self._max_late = max(1, config.max_queued_bytes // config.max_message_bytes)
        self._timeout_s = config.transfer_timeout_s
        #: the oldest first
        self._arriving: dict[Arrival, None] = {}
        #: how large it is, and since when it is on its way
        self._leaving: dict[Context, tuple[int, float]] = {}
        self._is_draining = False

    async def read(self, context: Context) -> bytes:
        """The one message of a call. Raises InvalidRequest when it brings none, and what refuses a message that is late."""
        arrival = Arrival()
        self._arriving[arrival] = None
        try:
            async with arrival.limit:
                message: Any = await asyncio.shield(to_its_end(context.read()))
        except TimeoutError:
            assert arrival.refusal is not None
            raise arrival.refusal() from None
        finally:
            del self._arriving[arrival]
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call brought no message")
        self.arriving.took(context, len(message))
        return bytes(message)

    def leave(self, context: Context, nbytes: int) -> None:
        """An answer of a call that has nothing else to do is counted until the call has ended."""
        self._begin(context, nbytes)
        context.add_done_callback(lambda _: self._end(context))  # type: ignore[arg-type]  # the stubs want a class

    async def write(self, context: Context, message: Any, nbytes: int) -> None:
        """One of the answers of a stream."""
        self._begin(context, nbytes)
        try:
            await asyncio.shield(to_its_end(context.write(message)))
        finally:
            self._end(context)

    def drain(self) -> None:
        """Messages that are late are not waited for any more."""
        self._is_draining = True

    async def watch(self) -> None:
        """Until it is cancelled: gives up what is stuck."""
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            now = time.monotonic()
            self._refuse_late(now)
            self.arriving.look(now)
            self._hang_up_on_slow(now)

    def _refuse_late(self, now: float) -> None:
        late = [arrival for arrival in self._arriving if now - arrival.began > LATE_S]
        for index, arrival in enumerate(late):
            if now - arrival.began > self._timeout_s:
                arrival.refuse(self._overdue)
            elif self._is_draining:
                arrival.refuse(lambda: ExpertUnavailable("the service is draining and waits for no message any more"))
            elif index >= self._max_late:
                arrival.refuse(self._too_many)

    def _overdue(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the message did not come within server.transfer_timeout_s = {self._timeout_s:g} s")

    def _too_many(self) -> Overloaded:
        return Overloaded(f"{self._max_late} messages that take longer than {LATE_S:g} s to come are being read; try again")

    def _hang_up_on_slow(self, now: float) -> None:
        for context, (nbytes, since) in list(self._leaving.items()):
            if now - since > self._timeout_s:
                # gRPC has no way to take back what it was given to send but to end the connection.
                peer = context.peer()
                is_gone = hang_up(peer)
                self._leaving[context] = nbytes, now
                _strangers.warning(
                    "%s has not taken an answer of %d bytes within %g s: %s",
                    *(peer, nbytes, self._timeout_s, "hung up" if is_gone else "its connection is not one of this process"),
                )

    def _begin(self, context: Context, nbytes: int) -> None:
        self._leaving[context] = nbytes, time.monotonic()
        self.budget.add(nbytes)

    def _end(self, context: Context) -> None:
        nbytes, _ = self._leaving.pop(context)
        self.budget.add(-nbytes)
