"""A thread for the passes that wait for experts to be read, so that passes whose experts are in memory do not wait with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class Lane(Generic[Result]):
    """Computes one pass at a time; `on_done` is called by its thread. All else is to be called by one thread.

    Nobody waits for its thread at the end: it may hang with the file system that it reads from.
    """

    def __init__(self, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self._compute: Callable[[], Result] | None = None
        self._result: Result | None = None
        self._is_ending = False
        self._begins = threading.Semaphore(0)
        self._ended = threading.Event()
        #: None until the first pass
        self._thread: threading.Thread | None = None
        self.is_busy = False

    def start(self, compute: Callable[[], Result]) -> None:
        """Begins one that must not raise; the lane is busy until its result has been taken."""
        assert not self.is_busy, "one at a time"
        self.is_busy, self._compute = True, compute
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="reading", daemon=True)
            self._thread.start()
        self._begins.release()

    def take(self) -> Result | None:
        """The result of the pass, once; None = there is none, or it is not done yet."""
        if not self._ended.is_set():
            return None
        self._ended.clear()
        self.is_busy, result, self._result = False, self._result, None
        return result

    def close(self) -> None:
        """Ends the thread after its pass."""
        self._is_ending = True
        self._begins.release()

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # as in the thread that computes the other passes
        while True:
            self._begins.acquire()
            if self._is_ending or self._compute is None:
                return
            self._result, self._compute = self._compute(), None
            self._ended.set()
            self._on_done()
