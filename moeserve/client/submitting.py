"""Calls of a blocking client that nobody waits for yet: an AsyncClient makes them, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from moeserve.client.fork import FORKS
from moeserve.errors import MoEServeError
from moeserve.loops import LoopThread

if TYPE_CHECKING:
    from moeserve.api.output import ForwardOutput
    from moeserve.client.async_client import AsyncClient

#: calls in progress; the next one waits until one of them is done
MAX_SUBMITTED: Final = 256
_END_S: Final = 5.0
#: a thread that is in compiled code while Python ends would abort the process
_LIVE: Final[weakref.WeakSet[_Work]] = weakref.WeakSet()


class Submitter:
    """`submit` calls from any thread; `close` cancels what is in progress, and so does the end of the program. Copies start anew.

    One that nobody refers to any more ends with the last of its calls.
    """

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        self._make = make
        #: reentrant, because a signal's handler may close it, too
        self._lock = threading.RLock()
        self._work: _Work | None = None
        self._is_closed = False
        FORKS.register(self)

    def submit(self, *arguments: Any, **named: Any) -> Future[ForwardOutput]:
        """`AsyncClient.forward` of these arguments."""
        with self._lock:
            if self._is_closed:
                raise MoEServeError("this client is closed")
            work = self._work
            if work is None or not work.thread.is_running:
                work = self._work = _Work(self._make())
                weakref.finalize(self, work.close_soon).atexit = False
        return work.submit(self, *arguments, **named)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._is_closed, work, self._work = True, self._work, None
        if work is not None and work.thread.is_running:
            work.close()

    def in_child(self) -> None:
        """This process was forked: whoever held the lock is not here."""
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Submitter], tuple[Callable[[], AsyncClient]]]:
        return Submitter, (self._make,)


class _Work:
    """A client and its thread."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        #: one for each further call that may be in progress; a signal's handler that closes it may put some
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(MAX_SUBMITTED):
            self._room.put(None)
        #: calls in progress, and whose they are: that is no garbage meanwhile
        self._running: dict[Future[ForwardOutput], Submitter] = {}
        #: held where a call begins, and where no further one may
        self._lock = threading.RLock()
        self._is_closed = False
        self._ending: asyncio.Task[None] | None = None
        self.thread = LoopThread("moeserve-client")
        self.thread.start()
        _LIVE.add(self)

    def submit(self, submitter: Submitter, *arguments: Any, **named: Any) -> Future[ForwardOutput]:
        work = self._client.forward(*arguments, **named)
        future: Future[ForwardOutput] | None = None
        has_room = self._wait_for_room()
        with self._lock:
            if not self._is_closed:
                with suppress(RuntimeError):  # a signal's handler has closed it this moment
                    future = self.thread.submit(work)
                    self._running[future] = submitter
        if future is None:  # closed, as while this call waited for room
            work.close()
            self._leave_room(has_room)
            raise MoEServeError("this client is closed")
        future.add_done_callback(partial(self._done, has_room))
        return future

    def _done(self, has_room: bool, future: Future[ForwardOutput]) -> None:
        self._leave_room(has_room)
        self._running.pop(future, None)

    def _wait_for_room(self) -> bool:
        """Whether room was taken: what waits on the loop, as a callback of a future, would keep all calls from being answered."""
        try:
            self._room.get(block=not self.thread.is_here)
        except Empty:
            return False
        return True

    def _leave_room(self, has_room: bool) -> None:
        if has_room:
            self._room.put(None)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        for future in list(self._running):
            future.cancel()
        self.close_soon()
        if not self.thread.is_here:
            self.thread.join(2 * _END_S)

    def close_soon(self) -> None:
        """Ends it, without waiting, from any thread in any state."""
        if self.thread.is_running:
            with suppress(RuntimeError):  # it has ended meanwhile
                self.thread.soon(self._leave)

    def _leave(self) -> None:
        self._ending = self._ending or asyncio.create_task(self._end())

    async def _end(self) -> None:
        """Calls end before their channel does."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        try:
            async with asyncio.timeout(_END_S):
                await asyncio.gather(*others, return_exceptions=True)
                await self._client.close()
        except TimeoutError:
            pass
        finally:
            self.thread.stop_soon()


@atexit.register
def _close_all() -> None:
    for work in tuple(_LIVE):
        if work.thread.is_running:
            work.close()
