"""Channels that are kept: opened when first needed, and replaced when they stop working."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import grpc

from moeserve.client.arguments import parse_seconds
from moeserve.client.connection import Reach
from moeserve.client.failures import to_error
from moeserve.client.fork import FORKS
from moeserve.errors import Cancelled, DeadlineExceeded, InvalidRequest, MoEServeError, ServiceUnreachable

#: how long a channel may fail to connect. gRPC looks up an unknown name less and less often, in the end every two minutes, while a
#: new channel looks at once
_GIVE_UP_S: Final = 5.0
#: whether the service was reached
_SAYS_NOTHING: Final = (DeadlineExceeded, Cancelled, asyncio.CancelledError, GeneratorExit)


class _Opened:
    """One channel, and its number of calls: it is closed when it is given up and the last call has ended."""

    def __init__(self, channel: Any, stubs: Any) -> None:
        self.channel, self.stubs = channel, stubs
        #: time.monotonic of the first call that failed to connect since one connected
        self.failing_since: float | None = None
        #: by the client
        self.is_closed = False
        self._lock = threading.Lock()
        self._running = 0
        self._is_given_up = False

    @property
    def is_useless(self) -> bool:
        return self.failing_since is not None and time.monotonic() - self.failing_since > _GIVE_UP_S

    def begin(self) -> bool:
        """Adds a call; False when the channel is given up."""
        with self._lock:
            self._running += not self._is_given_up
            return not self._is_given_up

    def end(self, error: BaseException | None) -> bool:
        """One call has ended. Returns whether the service has answered it."""
        is_answered = not isinstance(error, (ServiceUnreachable, *_SAYS_NOTHING))
        if is_answered:
            self.failing_since = None
        elif isinstance(error, ServiceUnreachable):
            self.failing_since = self.failing_since or time.monotonic()
        with self._lock:
            self._running -= 1
        self._close_if_done()
        return is_answered

    def give_up(self) -> None:
        with self._lock:
            self._is_given_up = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._is_given_up and not self._running and isinstance(self.channel, grpc.Channel):
            self.channel.close()
        # A channel of asyncio closes when nothing refers to it.


class Call:
    """A call in progress: `with` ends it, and turns errors of gRPC into MoEServeError."""

    __slots__ = ("_line", "_opened", "stubs", "timeout_s")

    def __init__(self, line: Line, opened: _Opened, timeout_s: float | None) -> None:
        self._line, self._opened = line, opened
        self.stubs, self.timeout_s = opened.stubs, timeout_s

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        target = self._line.reach.target
        if not isinstance(error, grpc.RpcError):
            self._end(error)
            if isinstance(error, ValueError) and self._opened.is_closed:  # before it was begun, as gRPC says it
                raise MoEServeError(f"this client of {target} is closed") from None
            return
        known = to_error(error, target, self.timeout_s)
        self._end(known)
        raise known from None

    def _end(self, error: BaseException | None) -> None:
        if self._opened.end(error):
            self._line.is_known = True


class Line:
    """A connection to a service, for any thread: one channel, opened when a call needs it, and not pickled or copied."""

    _is_async = False

    def __init__(self, reach: Reach, make_stubs: Callable[[Any], Any]) -> None:
        self.reach = reach
        self._make_stubs = make_stubs
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._is_closed = False
        #: whether the service has answered, on this channel or an earlier one
        self.is_known = False
        if not self._is_async:
            FORKS.register(self)

    def timeout_s(self, timeout: Any) -> float | None:
        """In seconds; None = what the client says. Raises InvalidRequest for one that cannot be."""
        return self.reach.timeout_s if timeout is None else parse_seconds(timeout, "timeout", InvalidRequest)

    def call(self, timeout: Any) -> Call:
        """timeout: None = the client's.

        Raises InvalidRequest for an invalid timeout, MoEServeError when this client is closed or cannot work in this process.
        """
        return self.within(self.timeout_s(timeout))

    def within(self, timeout_s: float | None) -> Call:
        """A call of so many seconds; None = without limit. Raises as `call`."""
        FORKS.check(self._is_async)
        opened = self._opened
        while opened is None or opened.is_useless or not opened.begin():
            opened = self._open()
        return Call(self, opened, timeout_s)

    def close(self) -> Any:
        """Refuses further calls; returns the channel, if there is one, for the caller to close."""
        with self._lock:
            self._is_closed, opened, self._opened = True, self._opened, None
        if opened is None:
            return None
        opened.is_closed = True
        return opened.channel

    def in_child(self) -> None:
        """This process was forked: what its parent has opened is not for it, and whoever held the lock is not here."""
        self._lock, self._opened = threading.Lock(), None

    def _open(self) -> _Opened:
        with self._lock:
            if self._is_closed:
                raise MoEServeError(f"this client of {self.reach.target} is closed")
            if self._opened is not None and self._opened.is_useless:
                self._opened.give_up()
                self._opened = None
            if self._opened is None:
                channel = self.reach.open_async() if self._is_async else self.reach.open()
                FORKS.opened(channel, self._is_async)
                self._opened = _Opened(channel, self._make_stubs(channel))
            return self._opened

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reach, self._make_stubs)


class AsyncLine(Line):
    """The same for one event loop."""

    _is_async = True


class LoopLines:
    """A line per event loop: a channel of asyncio belongs to the loop that opened it."""

    def __init__(self, reach: Reach, make_stubs: Callable[[Any], Any]) -> None:
        self.reach = reach
        self._make_stubs = make_stubs
        self._lock = threading.Lock()
        self._lines: dict[asyncio.AbstractEventLoop, AsyncLine] = {}

    @property
    def here(self) -> AsyncLine:
        """The line of the running loop."""
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None:
            line = AsyncLine(self.reach, self._make_stubs)
            with self._lock:  # loops of other threads find theirs for the first time, too
                self._lines = {one: known for one, known in self._lines.items() if not one.is_closed()} | {loop: line}
        return line

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reach, self._make_stubs)
