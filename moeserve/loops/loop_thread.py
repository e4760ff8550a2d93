"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """`start` it, `submit` or `call` coroutines from other threads, `stop` it. Its thread does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        #: reentrant, because a signal's handler may stop it, too
        self._stopping = threading.RLock()
        self._is_over = False

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._thread.is_alive()

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on it."""
        return threading.current_thread() is self._thread

    def start(self) -> None:
        """Starts the thread; coroutines that were submitted before run now."""
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the loop; returns a future for other threads."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """The result of `work`. Raises its error, and TimeoutError."""
        return self.submit(work).result(timeout_s)

    def soon(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Calls a function on the loop, without waiting."""
        self._loop.call_soon_threadsafe(callback, *arguments)

    def stop(self) -> None:
        """Ends the thread; coroutines that still run there never end. Idempotent, and from any other thread."""
        with self._stopping:
            if self.is_running:
                with suppress(RuntimeError):  # it has ended this moment
                    self._loop.call_soon_threadsafe(self.stop_soon)
                self.join()
            self._loop.close()

    def stop_soon(self) -> None:
        """As `stop`, on the loop, without waiting."""
        self._is_over = True
        self._loop.stop()

    def join(self, timeout_s: float | None = None) -> None:
        """Returns when the thread has ended, or after so long."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._is_over:
                with suppress(SystemExit):  # of a callback, as of a future: it would end what everybody else waits for
                    self._loop.run_forever()
        finally:
            self._loop.close()
