"""How signals end a verb.

Signals are blocked and a thread waits for them, because Ray installs handlers of its own in C++ that abort the process.
Only a verb without Ray and without an event loop gets them as an exception, from Python's handlers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from moeserve.cli.streams import tell

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


class Ended(BaseException):  # not a KeyboardInterrupt: typer would hide which signal it was
    """A signal ended this verb; `is_told`: the user has been told."""

    def __init__(self, number: signal.Signals, *, is_told: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.is_told = is_told

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it."""
        return exit_code(self.number)


def exit_code(number: signal.Signals) -> int:
    """As a shell shows it: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class _Watch:
    """The thread that waits for signals, and their receiver."""

    def __init__(self) -> None:
        self.receive: Callable[[signal.Signals], None] = _pass_on
        self.is_running = False

    def run(self) -> None:
        """Starts watching, for the life of the process. Call it in the main thread; otherwise other threads get the signals first."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
        if not self.is_running:
            self.is_running = True
            threading.Thread(target=self._wait, args=(_numbers(),), name="signals", daemon=True).start()

    def _wait(self, numbers: set[signal.Signals]) -> None:
        while True:
            number = signal.sigwait(numbers)
            self.receive(signal.Signals(number))


def end_at_once() -> None:
    """A signal ends the process, until `raise_ended`: nothing has started yet. Call it before other threads start."""
    _watch.receive = _exit
    _watch.run()


def raise_ended() -> None:
    """From now on signals raise `Ended` in the main thread."""
    for number in _numbers():
        signal.signal(number, _raise)
    _watch.receive = _pass_on
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers())


@contextmanager
def preparing() -> Iterator[None]:
    """For imports and what else takes seconds before a verb begins: a signal ends the process at once, and leaves no module half imported.

    Threads that start meanwhile never get a signal; elsewhere they would, and Python's handlers would miss what `heard` is for.
    """
    if not _watch.is_running:  # a program calls the verb and handles its own signals
        yield
        return
    end_at_once()
    try:
        yield
    finally:
        raise_ended()


def ignore() -> None:
    """From now on signals change nothing: the process is ending."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def heard() -> Iterator[asyncio.Queue[signal.Signals]]:
    """A queue that receives signals meanwhile."""
    import asyncio

    loop, numbers = asyncio.get_running_loop(), asyncio.Queue[signal.Signals]()
    handlers = {number: signal.getsignal(number) for number in _numbers()}
    _watch.receive = lambda number: _put(loop, numbers, number)
    _watch.run()
    try:
        yield numbers
    finally:
        _watch.receive = _pass_on
        for number, handler in handlers.items():
            signal.signal(number, handler)  # instead of Ray's
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _numbers())


async def until_signal(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. A signal cancels it; when it has cleaned up, Ended is raised."""
    import asyncio

    with heard() as numbers:
        working, ending = asyncio.create_task(work), asyncio.create_task(numbers.get())
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
        if working.cancelled():
            raise Ended(ending.result())
        ending.cancel()
        return working.result()


def _numbers() -> set[signal.Signals]:
    """Without SIGHUP where `nohup` ignores it."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {signal.SIGINT, signal.SIGTERM} | (set() if is_ignored else {signal.SIGHUP})


def _put(loop: asyncio.AbstractEventLoop, numbers: asyncio.Queue[signal.Signals], number: signal.Signals) -> None:
    loop.call_soon_threadsafe(numbers.put_nowait, number)


def _pass_on(number: signal.Signals) -> None:
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


def _raise(number: int, _frame: object) -> None:
    raise Ended(signal.Signals(number))


def _exit(number: signal.Signals) -> None:
    tell(f"ended by {number.name}")
    os._exit(exit_code(number))


_watch = _Watch()
