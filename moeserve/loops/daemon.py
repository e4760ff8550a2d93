"""Work in threads that nobody has to wait for: one that hangs, as on a file system that does not answer, keeps no process from ending.

At the end of Python, when the pools of `asyncio.to_thread` are closed, `in_thread` still works: what stops a service uses it.
"""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar, TypeVarTuple

Args = TypeVarTuple("Args")
Item = TypeVar("Item")
Result = TypeVar("Result")

_NAME: Final = "moeserve-work"
#: for work that nobody waits for any more, at the end of the process
_PATIENCE_S: Final = 2.0


async def in_thread(function: Callable[[*Args], Result], *args: *Args) -> Result:
    """`function(*args)` in a thread of its own; who is cancelled meanwhile leaves it to itself."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        future: Future[Result] = Future()
        _fulfil(future, function, *args)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(_pass_on, future, done)

    try:
        threading.Thread(target=run, name=_NAME, daemon=True).start()
    except RuntimeError:  # Python 3.12 starts no thread any more at its end
        run()
    return await done


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """What `function` returns for each item, in their order, by so many threads at most. Raises the first error; the rest is not begun."""
    waiting: queue.SimpleQueue[tuple[Item, Future[Result]]] = queue.SimpleQueue()
    futures: list[Future[Result]] = []
    for item in items:
        futures.append(Future())
        waiting.put((item, futures[-1]))

    def run() -> None:
        with suppress(queue.Empty):
            while True:
                item, future = waiting.get_nowait()
                if future.set_running_or_notify_cancel():
                    _fulfil(future, function, item)

    if len(futures) == 1:
        run()  # a thread of its own would only keep what it frees for itself
    for _ in range(min(num_threads, waiting.qsize())):
        threading.Thread(target=run, name=_NAME, daemon=True).start()
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _fulfil(future: Future[Result], function: Callable[[*Args], Result], *args: *Args) -> None:
    try:
        future.set_result(function(*args))
    except StopIteration as error:  # no coroutine can raise it
        future.set_exception(RuntimeError("a function in a thread raised StopIteration").with_traceback(error.__traceback__))
    except BaseException as error:  # whoever waits for it gets it
        future.set_exception(error)


def _pass_on(future: Future[Result], done: asyncio.Future[Result]) -> None:
    if done.done():
        return  # nobody waits any more
    if (error := future.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(future.result())


@atexit.register
def _leave_none_behind() -> None:
    """A thread that is in compiled code while Python ends would abort the process; one that hangs in a file system does not."""
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join(max(0.0, deadline - time.monotonic()))
