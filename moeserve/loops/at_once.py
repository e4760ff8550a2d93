"""Coroutines that begin in the call that starts them, not in the next turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

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


def to_its_end(work: Coroutine[Any, Any, Result]) -> asyncio.Future[Result]:
    """Runs `work`, which is no task, so nothing can cancel it: whoever cancels what is returned, or sets it, leaves `work` to itself."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()
    done.add_done_callback(lambda _: done.cancelled() or done.exception())  # whoever waited for it may have gone

    def step(_: object = None) -> None:
        try:
            awaited = work.send(None)
        except StopIteration as end:
            if not done.done():
                done.set_result(end.value)
        except BaseException as error:  # whoever waits for it gets it
            if not done.done():
                done.set_exception(error)
        else:
            if awaited is None:
                loop.call_soon(step)
                return
            awaited._asyncio_future_blocking = False  # as a task does with what it waits for
            awaited.add_done_callback(step)

    step()
    return done


class _Begun(Coroutine[Any, Any, Result]):
    """What is left of a coroutine, for a task: first of all it waits for what it waits for already."""

    def __init__(self, work: Coroutine[Any, Any, Result], awaited: Any) -> None:
        self._work, self._awaited = work, awaited
        self._is_waiting = False

    def send(self, value: Any) -> Any:
        if self._is_waiting:
            return self._work.send(value)
        self._is_waiting = True
        return self._awaited

    def throw(self, *error: Any) -> Any:
        self._is_waiting = True
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Any:
        raise TypeError("it runs as a task")
