"""Coroutines that begin in the call that starts them, not in the next turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


def begin(work: Coroutine[Any, Any, Result]) -> asyncio.Future[Result]:
    """Runs `work` until it waits for the first time; the rest is a task. Cancelling what is returned cancels the rest.

    Raises what `work` raises before it waits.
    """
    loop = asyncio.get_running_loop()
    try:
        awaited = work.send(None)
    except StopIteration as end:
        done: asyncio.Future[Result] = loop.create_future()
        done.set_result(end.value)
        return done
    return loop.create_task(_Begun(work, awaited))


#: calls what it is given, now or later
Soon = Callable[[Callable[[], None]], None]


def to_its_end(work: Coroutine[Any, Any, Result], go_on: Soon | None = None) -> asyncio.Future[Result]:
    """Runs `work`, which is no task, so nothing can cancel it: whoever cancels what is returned, or sets it, leaves `work` to itself.

    `go_on` decides when it goes on after what it has waited for; None = at once.
    """
    through = _ThroughToTheEnd(work, asyncio.get_running_loop(), go_on)
    through.step()
    return through.done


class _ThroughToTheEnd(Generic[Result]):
    """A coroutine that runs; nothing refers to it any more when it has ended, so what it returned is freed without a search for cycles."""

    def __init__(self, work: Coroutine[Any, Any, Result], loop: asyncio.AbstractEventLoop, go_on: Soon | None) -> None:
        self.done: asyncio.Future[Result] = loop.create_future()
        self.done.add_done_callback(_look_at_error)  # whoever waited for it may have gone
        self._work, self._loop, self._go_on = work, loop, go_on

    def step(self) -> None:
        try:
            awaited = self._work.send(None)
        except StopIteration as end:
            if not self.done.done():
                self.done.set_result(end.value)
        except BaseException as error:  # whoever waits for it gets it
            error.__traceback__ = None  # whose frames refer to the error, here and in gRPC
            if not self.done.done():
                self.done.set_exception(error)
        else:
            if awaited is None:
                self._loop.call_soon(self.step)
                return
            awaited._asyncio_future_blocking = False  # as a task does with what it waits for
            awaited.add_done_callback(self._woken)

    def _woken(self, _: object) -> None:
        if self._go_on is None:
            self.step()
        else:
            self._go_on(self.step)


def _look_at_error(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


class _Begun(Coroutine[Any, Any, Result]):
    """What is left of a coroutine, for a task: first of all it waits for what it waits for already."""

    def __init__(self, work: Coroutine[Any, Any, Result], awaited: Any) -> None:
        self._work, self._awaited = work, awaited
        self._is_waiting = False

    def send(self, value: Any) -> Any:
        if self._is_waiting:
            return self._work.send(value)
        self._is_waiting = True
        awaited, self._awaited = self._awaited, None
        return awaited

    def throw(self, *error: Any) -> Any:
        self._is_waiting, self._awaited = True, None
        try:
            return self._work.throw(*error)
        finally:
            del error  # which refers to this frame

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Any:
        raise TypeError("it runs as a task")
