"""What has come of messages that are not there in full yet: of streams, and of other calls that have waited for theirs.

To gRPC a call that waits for its caller and one whose caller has sent half of a message look the same. But the kernel counts what a
connection has brought: what is more than the messages that were taken of it has come of others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

from moeserve.config import ServerConfig
from moeserve.errors import DeadlineExceeded, MoEServeError, Overloaded
from moeserve.server.byte_budget import ByteBudget
from moeserve.server.connections import Address, address_of, received_bytes
from moeserve.server.rpc import Context

#: what may come of messages before anybody asks where the rest is
_LEAST_BYTES: Final = 2**18
#: what a message may bring besides itself: frames and headers of HTTP/2, TLS; and what a connection may bring in a second beside messages
_EXTRA_BYTES: Final = 2**14
_EXTRA_BYTES_PER_S: Final = 100.0
#: what a call brings of a message that nobody reads, and how long that may be under way
_UNREAD_BYTES: Final = 2**16
_UNREAD_S: Final = 5.0
#: looking takes at most one part in so many of the time
_LOOK_SHARE: Final = 20
#: how much will come, as a multiple of what has come of something of unknown size: as much again (Lindy's law)
_EXPECTED: Final = 2


class SingleMessage:
    """The one message of a call: `read` is its future, awaited since `began`, monotonic seconds, by `context`."""

    __slots__ = ("began", "context", "read")

    def __init__(self, read: asyncio.Future[Any], context: Context) -> None:
        self.read, self.context, self.began = read, context, time.monotonic()

    def refuse(self, refusal: Callable[[], MoEServeError]) -> None:
        """Nobody waits for it any more."""
        self.fail(refusal())

    def fail(self, refusal: MoEServeError) -> None:
        """As above."""
        if not self.read.done():
            self.read.set_exception(refusal)


class MessageStream:
    """Messages of a stream, the next of which is `read`: whoever waits for them is in `limit`, which `refuse` ends.

    `refusal` makes the error: one that was kept here would keep the frames that it was raised in, and with them messages, until cycles of
    references are collected.
    """

    __slots__ = ("began", "limit", "read", "refusal")

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.read: asyncio.Future[Any] | None = None
        self.limit = asyncio.timeout(None)
        self.refusal: Callable[[], MoEServeError] | None = None

    def refuse(self, refusal: Callable[[], MoEServeError]) -> None:
        """Nobody waits for them any more."""
        if self.refusal is None:
            self.refusal = refusal
            self.limit.reschedule(0)


class _Connection:
    """One that has calls whose messages are awaited."""

    def __init__(self, now: float, received: int | None = None) -> None:
        """It has brought `received` bytes, of which none are left to take; None: what it has when it is looked at first."""
        self.awaited: dict[SingleMessage | MessageStream, None] = {}
        #: of messages that have not come in full
        self.bytes = 0
        #: since when it has had any, and since when nothing was taken of it
        self.began = self.taken_at = now
        self._looked_at = now
        #: how much of what it has brought is not left to take
        self._accounted = None if received is None else float(received)
        #: how much of what comes until then is dropped with its calls
        self._dropped, self._dropped_until = 0.0, now

    @property
    def is_large(self) -> bool:
        """Whether more has come than what a few messages under way would explain."""
        return self.bytes >= _LEAST_BYTES

    @property
    def being_read(self) -> list[SingleMessage | MessageStream]:
        """Those whose callers are waited for. The others wait for room, or until an answer was taken: what comes meanwhile is not late."""
        return [one for one in self.awaited if one.read is not None and not one.read.done()]

    def took(self, nbytes: int, now: float) -> None:
        """A message that it has brought was taken."""
        self.taken_at = now
        if self._accounted is not None:
            self._accounted += nbytes + _EXTRA_BYTES

    def drop(self, now: float) -> None:
        """A call has ended; nobody reads what it brings, or has brought."""
        self._dropped, self._dropped_until = self._dropped + _UNREAD_BYTES + _EXTRA_BYTES, now + _UNREAD_S

    def look(self, received: int, now: float) -> None:
        """It has brought `received` bytes."""
        if not self.is_large:
            self.began = now
        if not self.is_large or not self.being_read:
            self.taken_at = now
        accounted = received if self._accounted is None else self._accounted + _EXTRA_BYTES_PER_S * (now - self._looked_at)
        dropped = min(self._dropped, max(0.0, received - accounted))
        self._dropped = self._dropped - dropped if now < self._dropped_until else 0.0
        self._accounted, self._looked_at = min(accounted + dropped, received), now
        self.bytes = int(received - self._accounted)


def _end(calls: Iterable[SingleMessage | MessageStream], refusal: Callable[[], MoEServeError]) -> None:
    """What has come of their messages is dropped."""
    for one in calls:
        one.refuse(refusal)


class Arriving:
    """Of one server. No more is kept than there is room for in `budget`, and nothing for ever."""

    def __init__(self, config: ServerConfig, budget: ByteBudget) -> None:
        self._budget, self._config = budget, config
        self._connections: dict[Address, _Connection] = {}
        self._streams: dict[Context, MessageStream] = {}
        self._look_at = 0.0
        #: at which the server listens; 0 = not yet
        self.port = 0

    @property
    def has_streams(self) -> bool:
        """Whether a stream that reads messages has not ended."""
        return bool(self._streams)

    @asynccontextmanager
    async def stream(self, context: Context) -> AsyncIterator[None]:
        """A stream that reads messages. Raises what ends it when one takes too long to come, or there is no room for what comes."""
        stream = self._streams[context] = MessageStream()
        connection = self._connection_of(context, lambda address: received_bytes([address], self.port).get(address, 0))
        connection.awaited[stream] = None
        try:
            async with stream.limit:
                yield
        except TimeoutError:
            if stream.refusal is None:
                raise
            raise stream.refusal() from None
        finally:
            del self._streams[context]
            self.forget(stream, context)

    def note_read(self, context: Context, read: asyncio.Future[Any]) -> None:
        """`read` is the next message of a stream, or that of another call."""
        if (stream := self._streams.get(context)) is not None:
            stream.read = read

    def notice(self, messages: Iterable[SingleMessage]) -> None:
        """Messages that are still awaited are looked at from now on."""
        for message in messages:
            self._connection_of(message.context, lambda _: None).awaited[message] = None

    def forget(self, awaited: SingleMessage | MessageStream, context: Context) -> None:
        """It is not awaited any more; nothing if it never was."""
        if self._connections and (connection := self._connections.get(address := address_of(context.peer()))) is not None:
            connection.awaited.pop(awaited, None)
            if not connection.awaited:
                del self._connections[address]

    def _connection_of(self, context: Context, received: Callable[[Address], int | None]) -> _Connection:
        address = address_of(context.peer())
        if address not in self._connections:
            self._connections[address] = _Connection(time.monotonic(), received(address))
        return self._connections[address]

    def took(self, context: Context, nbytes: int) -> None:
        """A message was read in full, of a stream or of another call."""
        if self._connections and (connection := self._connections.get(address_of(context.peer()))) is not None:
            connection.took(nbytes, time.monotonic())

    def ended(self, context: Context) -> None:
        """A call was refused, or has failed."""
        if self._connections and (connection := self._connections.get(address_of(context.peer()))) is not None:
            connection.drop(time.monotonic())

    def look(self, now: float) -> None:
        """Ends calls that have to end; does nothing if that was done a moment ago."""
        if not self._connections or now < self._look_at:
            return
        began_s = time.thread_time()  # on a busy machine looking takes long, but not much of the time of this thread
        received = received_bytes(self._connections.keys(), self.port)
        self._look_at = now + _LOOK_SHARE * (time.thread_time() - began_s)
        for address, connection in self._connections.items():
            if address in received:
                connection.look(received[address], now)
        self._end_late(now)
        self._end_those_without_room()

    def _end_late(self, now: float) -> None:
        limit_s = self._config.transfer_timeout_s
        for connection in self._connections.values():
            if connection.is_large and now - connection.taken_at > limit_s:
                _end(
                    connection.being_read,
                    lambda: DeadlineExceeded(f"a message did not come within server.transfer_timeout_s = {limit_s:g} s"),
                )

    def _end_those_without_room(self) -> None:
        """The latest first; there is always room for one message."""
        room = self._budget.room - _EXPECTED * sum(one.bytes for one in self._connections.values() if not one.is_large)
        large = sorted((one for one in self._connections.values() if one.is_large), key=lambda one: one.began)
        for place, connection in enumerate(large):
            room -= _EXPECTED * connection.bytes
            is_one_message = place == 0 and connection.bytes <= self._config.max_message_bytes + _LEAST_BYTES
            if room < 0 and not is_one_message:
                _end(
                    connection.awaited,
                    lambda: Overloaded(
                        f"messages bring more than server.max_queued_bytes = {self._config.max_queued_bytes} leaves room for; try again"
                    ),
                )
