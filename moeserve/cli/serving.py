"""What `serve` and `frontend` share: from start to end, as signals decide."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from moeserve.cli.signals import Ended, heard, preparing
from moeserve.cli.streams import tell
from moeserve.files.version import running_version


def tell_start(what: str) -> None:
    """The first line of a verb that takes seconds to start, before its imports."""
    tell(f"starting moeserve {running_version()}, {what}")


def prepare_process() -> None:
    """As every process that answers callers."""
    with preparing():  # also for the threads that start here: a signal must never be theirs
        from moeserve.programs import process

        process.prepare()


class Serving(Protocol):
    """A service that listens."""

    @property
    def target(self) -> str:
        """host:port of gRPC, as a client on this machine takes it."""
        ...

    @property
    def metrics_target(self) -> str:
        """host:port of the metrics port."""
        ...

    async def stop(self) -> None:
        """Finish running requests, then end everything."""
        ...

    async def hurry(self) -> None:
        """While it stops: do not wait for running requests."""
        ...


async def serve_until_told(service: Serving, start: Coroutine[Any, Any, None], over: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Serve from the end of `start` until a signal comes, or `over()` returns or raises; then drain.

    A signal before it is ready undoes the start; a second signal cuts the drain short. Both raise Ended. The first signal while it serves
    does not. Errors of `start` and `over()` are raised, too.
    """
    with heard() as signals:
        first = asyncio.create_task(signals.get())
        await _started(service, start, first)
        tell(f"metrics at http://{service.metrics_target}/metrics")
        tell(f"ready {service.target}")
        ending = asyncio.create_task(over())
        await asyncio.wait({first, ending}, return_when=asyncio.FIRST_COMPLETED)
        tell("draining; repeat to stop at once")
        second = asyncio.create_task(signals.get()) if first.done() else first
        await _stopped(service, second)
        if ending.done():
            await ending
        ending.cancel()
        tell("stopped")


async def _started(service: Serving, start: Coroutine[Any, Any, None], first: asyncio.Task[signal.Signals]) -> None:
    starting = asyncio.create_task(start)
    await asyncio.wait({starting, first}, return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        tell(f"{first.result().name} before it was ready: stopping what was started")
        starting.cancel()
        await asyncio.wait({starting})
        if not starting.cancelled() and starting.exception() is None:
            await service.stop()
        raise Ended(first.result(), is_told=True)
    await starting


async def _stopped(service: Serving, again: asyncio.Task[signal.Signals]) -> None:
    stopping = asyncio.create_task(service.stop())
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        tell(f"{again.result().name}: stopping at once")
        await service.hurry()
        await stopping
        raise Ended(again.result(), is_told=True)
    again.cancel()
    await stopping
