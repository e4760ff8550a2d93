"""Calls of a blocking client that nobody waits for yet: an AsyncClient makes them, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from moeserve.errors import MoEServeError
from moeserve.loops import LoopThread

if TYPE_CHECKING:
    from moeserve.api.output import ForwardOutput
    from moeserve.client.async_client import AsyncClient

#: calls in progress; the next one waits until one of them is done
MAX_SUBMITTED: Final = 256
_END_S: Final = 5.0


class Submitter:
    """`submit` calls from any thread; `close` cancels what is in progress. Copies, and processes forked from this one, start anew."""

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._work: _Work | None = None
        self._is_closed = False

    def submit(self, *arguments: Any, **named: Any) -> Future[ForwardOutput]:
        """`AsyncClient.forward` of these arguments."""
        with self._lock:
            if self._is_closed:
                raise MoEServeError("this client is closed")
            if self._work is None or not self._work.thread.is_running:
                self._work = _Work(self._make())
            work = self._work
        return work.submit(*arguments, **named)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._is_closed, work, self._work = True, self._work, None
        if work is not None and work.thread.is_running:
            work.close()

    def __reduce__(self) -> tuple[type[Submitter], tuple[Callable[[], AsyncClient]]]:
        return Submitter, (self._make,)


class _Work:
    """A client and its thread."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._room = threading.Semaphore(MAX_SUBMITTED)
        self._running: set[Future[ForwardOutput]] = set()
        #: held where a call begins, and where no further one may
        self._lock = threading.Lock()
        self._is_closed = False
        self.thread = LoopThread("moeserve-client")
        self.thread.start()

    def submit(self, *arguments: Any, **named: Any) -> Future[ForwardOutput]:
        work = self._client.forward(*arguments, **named)
        self._room.acquire()
        with self._lock:
            if self._is_closed:  # while this call waited for room
                work.close()
                self._room.release()
                raise MoEServeError("this client is closed")
            future = self.thread.submit(work)
            self._running.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[ForwardOutput]) -> None:
        self._running.discard(future)
        self._room.release()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        for future in list(self._running):
            future.cancel()
        with suppress(TimeoutError):
            self.thread.call(self._end(), _END_S)
        self.thread.stop()

    async def _end(self) -> None:
        """Calls end before their channel does."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
