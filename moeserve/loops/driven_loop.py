"""An event loop that is run by whoever waits for it."""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

#: how long nobody has waited when the loop's own thread takes over: longer than a busy program pauses between two calls
_LINGER_S: Final = 0.01
_LIVE: Final[weakref.WeakSet[DrivenLoop]] = weakref.WeakSet()


class Waiter:
    """A thread that waits for something that the loop will bring: `done` is called on the loop when it is there."""

    __slots__ = ("_is_running", "_loop", "_wakes", "is_done", "may_drive")

    def __init__(self, loop: asyncio.AbstractEventLoop, may_drive: bool) -> None:
        self.is_done = False
        self.may_drive = may_drive
        self._loop, self._is_running = loop, False
        self._wakes = threading.Lock()
        self._wakes.acquire()

    def done(self, *_: object) -> None:
        """It need not wait any longer."""
        self.is_done = True
        if self._is_running:
            self._loop.stop()
        else:
            self.wake()

    def wake(self) -> None:
        """Ends `sleep`: it is done, or is to drive, or nobody will ever run the loop again."""
        if self._wakes.locked():
            self._wakes.release()

    def sleep(self) -> None:
        """Until it is woken."""
        self._wakes.acquire()

    def drive(self) -> None:
        """Runs the loop until it is done."""
        self._is_running = True
        try:
            while not self.is_done:
                self._loop.run_forever()
        finally:
            self._is_running = False


class DrivenLoop:
    """The thread that waits runs the loop: what it waits for then needs no switch to another thread and back.

    Of several that wait, one runs it for all, and makes another its successor; when none waits, a thread of its own does. Only one thread
    runs the loop at a time, so for what happens on it there is no difference.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        _LIVE.add(self)
        #: an exception, as of Ctrl-C, came out of the loop: what it interrupted may be left half done
        self.is_interrupted = False
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)
        self._lock = threading.Lock()
        #: who runs the loop; None = nobody, for a moment
        self._driver: Waiter | threading.Thread | None = None
        self._waiting: dict[Waiter, None] = {}
        self._turns = 0
        self._is_stopping = False

    def start(self) -> None:
        """Starts its thread, which does not keep the process alive."""
        self._thread.start()

    def never_start(self) -> None:
        """Instead of `start`."""
        self.loop.close()

    def wait(self, begin: Callable[..., object], *arguments: Any, may_drive: bool = True) -> None:
        """Calls `begin(waiter, *arguments)` on the loop, which must not raise, and returns after `waiter.done()`.

        may_drive: this thread may run the loop meanwhile, with all that happens there; else it sleeps. Raises RuntimeError once the loop
        has ended.
        """
        waiter = Waiter(self.loop, may_drive)
        try:  # it may be the driver as soon as it has asked: Ctrl-C would leave the loop to nobody
            if self._is_mine(waiter):
                self.loop.call_soon(begin, waiter, *arguments)
            else:
                self.loop.call_soon_threadsafe(begin, waiter, *arguments)
            if self._driver is not waiter:
                waiter.sleep()
            if self._driver is waiter:
                self._drive(waiter)
            elif not waiter.is_done:
                raise RuntimeError("the event loop has ended")
        finally:
            self._leave(waiter)

    def stop(self) -> None:
        """On the loop, which ends with its thread: nobody may wait any more."""
        self._is_stopping = True
        self.loop.stop()

    def _is_mine(self, waiter: Waiter) -> bool:
        """Whether nobody runs the loop, so that `waiter` does; else it is asked to soon, if the loop's own thread does."""
        with self._lock:
            if self._driver is None and waiter.may_drive:
                self._driver = waiter
                self._turns += 1
                return True
            self._waiting[waiter] = None
            if self._driver is self._thread and waiter.may_drive:
                self.loop.call_soon_threadsafe(self.loop.stop)
            return False

    def _drive(self, waiter: Waiter) -> None:
        try:
            waiter.drive()
        except BaseException:
            self.is_interrupted = True
            raise

    def _leave(self, waiter: Waiter) -> None:
        with self._lock:
            self._waiting.pop(waiter, None)
            if self._driver is waiter:
                self._succeed()

    def _succeed(self) -> None:
        """The next of those who wait is to run the loop. The lock is held."""
        self._driver = next((waiter for waiter in self._waiting if waiter.may_drive and not waiter.is_done), None)
        if self._driver is not None:
            del self._waiting[self._driver]
            self._turns += 1
            self._driver.wake()

    def _keep(self) -> None:
        """In its own thread: runs the loop when nobody has for a while."""
        seen = 0
        while not self._has_ended():
            with self._lock:
                if self._driver is None and self._turns == seen:
                    self._driver = self._thread
                seen = self._turns
            if self._driver is not self._thread:
                time.sleep(_LINGER_S)
                continue
            try:
                self.loop.run_forever()
            except BaseException:  # Ctrl-C in a thread that drove before, once more: whoever waits for that task gets it
                self.is_interrupted = True
            with self._lock:
                self._succeed()
                seen = self._turns - 1  # whoever has asked for the loop will soon ask again

    def _has_ended(self) -> bool:
        """Whether it was stopped and nobody runs it; then it is closed, and who begins to wait now is not left waiting."""
        with self._lock:
            if self._is_stopping and self._driver is None:
                self.loop.close()
                for waiter in self._waiting:
                    waiter.wake()
            return self.loop.is_closed()

    def leave_to_parent(self) -> None:
        """In a forked process: what the kernel watches for the loop is the parent's, too.

        Nothing would wake the parent up any more if the loop were closed here, as when it is garbage.
        """
        if not self.loop.is_closed():
            with selectors.DefaultSelector() as own:
                os.dup2(own.fileno(), self._selector.fileno(), inheritable=False)


def _in_child() -> None:
    for driven in tuple(_LIVE):
        driven.leave_to_parent()


os.register_at_fork(after_in_child=_in_child)
