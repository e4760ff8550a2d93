"""Calls that nobody waits for yet, for `EmbeddedClient.submit`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

from moeserve.api.output import ForwardOutput
from moeserve.errors import MoEServeError

#: calls in progress; the next one waits until one of them is done
SIDE_BY_SIDE: Final = 64


class SubmittedCalls:
    """Each has a thread of a pool, which ends with this object or by `close`. Processes forked from this one start anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: _Threads | None = None
        self._is_closed = False

    def submit(self, call: Callable[[], ForwardOutput]) -> Future[ForwardOutput]:
        """`call`, in a thread. Waits while there is no room."""
        with self._lock:
            if self._is_closed:
                raise MoEServeError("this client is closed")
            if self._work is None or self._work.pid != os.getpid():
                self._work = _Threads()
            work = self._work
        has_room = work.wait_for_room()
        try:
            future = work.pool.submit(call)
        except RuntimeError:  # closed, maybe while this call waited for room
            work.leave_room(has_room)
            raise MoEServeError("this client is closed") from None
        future.add_done_callback(lambda _: work.leave_room(has_room))
        return future

    def close(self) -> None:
        """What runs goes on; nothing new begins. Idempotent."""
        with self._lock:
            self._is_closed, work = True, self._work
        if work is not None and work.pid == os.getpid():
            work.pool.shutdown(wait=False)


class _Threads:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._here = threading.local()
        self.pool = ThreadPoolExecutor(SIDE_BY_SIDE, "moeserve-submit", partial(setattr, self._here, "is_worker", True))
        self._room = threading.Semaphore(SIDE_BY_SIDE)

    def wait_for_room(self) -> bool:
        """Whether room was taken. Callbacks of futures run in the pool's threads: if all waited there, none would make room."""
        return self._room.acquire(blocking=not hasattr(self._here, "is_worker"))

    def leave_room(self, has_room: bool) -> None:
        """has_room: what `wait_for_room` said."""
        if has_room:
            self._room.release()
