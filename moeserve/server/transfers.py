"""Messages on their way in, answers on their way out: bytes that depend on how fast a stranger sends or reads.

gRPC tells neither how long a message will be nor how much of it has come. A small one is there at once. Of others, the kernel tells how
much has come, and those that there is no room for are refused; of those that take long only a few are waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from moeserve.config import ServerConfig
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, MoEServeError, Overloaded
from moeserve.log_limit import limited_logger
from moeserve.loops import SingleFile, to_its_end
from moeserve.server.arriving import Arriving, SingleMessage
from moeserve.server.byte_budget import ByteBudget
from moeserve.server.connections import hang_up
from moeserve.server.rpc import Context

#: what takes longer to arrive is late
LATE_S: Final = 0.25
#: what has not arrived so soon may be large: gRPC makes one piece of its many, which holds up the event loop for 1.5 ms per megabyte
_PROMPT_S: Final = 0.005
#: a fast network brings some tens of megabytes in this time
_LOOK_AGAIN_S: Final = 0.02

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
        #: what is awaited, the oldest first
        self._messages: dict[SingleMessage, None] = {}
        #: how large it is, and since when it is on its way
        self._leaving: dict[Context, tuple[int, float]] = {}
        #: set while anything is awaited or leaving
        self._is_busy = asyncio.Event()
        self._is_draining = False
        #: monotonic seconds: what was on its way before has come, or is late from then on
        self._not_before = 0.0
        #: for messages that are late, since then
        self._has_looked = True
        self._putting_together = SingleFile()

    async def read(self, context: Context) -> bytes:
        """The one message of a call. Raises InvalidRequest when it brings none, and what refuses a message that is late."""
        awaited = SingleMessage(self.begin_read(context), context)
        self._messages[awaited] = None
        try:
            message = await awaited.read
        finally:
            del self._messages[awaited]
            self.arriving.forget(awaited, context)
            del awaited  # an error that its future keeps refers to this frame
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call brought no message")
        self.arriving.took(context, len(message))
        return bytes(message)

    def begin_read(self, context: Context) -> asyncio.Future[Any]:
        """The next message of a call. Large ones are put together in turns: between them, others that there is no room for are refused."""
        began = time.monotonic()
        self._is_busy.set()

        def go_on(put_together: Callable[[], None]) -> None:
            if time.monotonic() - began < _PROMPT_S:
                put_together()
            else:
                self._putting_together.take(put_together)

        # gRPC never frees what it needs for a read or write that is cancelled.
        read = to_its_end(context.read(), go_on)
        self.arriving.note_read(context, read)
        return read

    async def messages(self, context: Context) -> AsyncIterator[bytes]:
        """Those of a stream, as they come."""
        while (message := await self.begin_read(context)) is not grpc.aio.EOF:
            self.arriving.took(context, len(message))
            yield message

    def leave(self, context: Context, nbytes: int) -> None:
        """An answer of a call that has nothing else to do is counted until the call has ended."""
        self._begin(context, nbytes)
        context.add_done_callback(lambda _: self._end(context))  # type: ignore[arg-type]  # the stubs want a class

    async def write(self, context: Context, message: Any, nbytes: int) -> None:
        """One of the answers of a stream. It is counted until it was taken, also when the call has ended before."""
        self._begin(context, nbytes)
        await to_its_end(self._write(context, message))

    async def _write(self, context: Context, message: Any) -> None:
        try:
            await context.write(message)
        finally:
            self._end(context)

    def drain(self) -> None:
        """Messages that are late are not waited for any more."""
        self._is_draining = True

    async def watch(self) -> None:
        """Until it is cancelled: gives up what is stuck."""
        while await self._is_busy.wait():
            due = time.monotonic() + _LOOK_AGAIN_S
            await asyncio.sleep(_LOOK_AGAIN_S)
            now = time.monotonic()
            self._be_patient(now, is_behind=now - due > LATE_S / 2)
            self._refuse_late(now)
            self.arriving.notice(self._messages)
            self.arriving.look(now)
            self._hang_up_on_slow(now)
            if not (self._messages or self._leaving or self.arriving.has_streams):
                self._is_busy.clear()

    def _be_patient(self, now: float, *, is_behind: bool) -> None:
        """A process that was stopped itself reads now what has come meanwhile. One that is always behind has read it by the next look."""
        if is_behind and self._has_looked:
            self._not_before, self._has_looked = now, False
        else:
            self._has_looked = self._has_looked or now - self._not_before > LATE_S

    def _refuse_late(self, now: float) -> None:
        late = [message for message in self._messages if now - max(message.began, self._not_before) > LATE_S]
        for index, message in enumerate(late):
            if (refusal := self._refusal(index, now - message.began)) is not None:
                message.fail(refusal)

    def _refusal(self, index: int, waited_s: float) -> MoEServeError | None:
        """Of the late message number `index`, the longest awaited first."""
        if waited_s > self._timeout_s:
            return DeadlineExceeded(f"the message did not come within server.transfer_timeout_s = {self._timeout_s:g} s")
        if self._is_draining:
            return ExpertUnavailable("the service is draining and waits for no message any more")
        if index >= self._max_late:
            return Overloaded(f"{self._max_late} messages that take longer than {LATE_S:g} s to come are being read; try again")
        return None

    def _hang_up_on_slow(self, now: float) -> None:
        for context, (nbytes, since) in list(self._leaving.items()):
            if now - since > self._timeout_s:
                # gRPC has no way to take back what it was given to send but to end the connection.
                peer = context.peer()
                is_gone = hang_up(peer, self.arriving.port)
                self._leaving[context] = nbytes, now
                _strangers.warning(
                    "%s has not taken an answer of %d bytes within %g s: %s",
                    *(peer, nbytes, self._timeout_s, "hung up" if is_gone else "its connection is not one of this process"),
                )

    def _begin(self, context: Context, nbytes: int) -> None:
        self._leaving[context] = nbytes, time.monotonic()
        self._is_busy.set()
        self.budget.add(nbytes)

    def _end(self, context: Context) -> None:
        nbytes, _ = self._leaving.pop(context)
        self.budget.add(-nbytes)
