"""Changes in turn: one at a time, and each to its end, even if its caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from moeserve.control import timing
from moeserve.control.audit import ChangeWithdrawn
from moeserve.log_limit import limited_logger

strangers = limited_logger(__name__)

Changed = TypeVar("Changed")


def _tell_of_failure(change: asyncio.Task[Any]) -> None:
    """Logs the failure of a change whose caller is gone."""
    if not change.cancelled() and (error := change.exception()) is not None:
        strangers.warning("a change failed after its caller had left: %s", error)


class ChangeQueue:
    """Until `abandon`, which withdraws what is under way."""

    def __init__(self) -> None:
        self.is_ending = False
        self._one_at_a_time = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    async def in_turn(self, change: Callable[[], Awaitable[Changed]]) -> Changed:
        """Makes it when those before it have ended."""
        async with self._one_at_a_time:
            return await change()

    async def to_its_end(self, change: Coroutine[Any, Any, Changed]) -> Changed:
        """Finishes the change even if its caller leaves. Raises what it raises, or ChangeWithdrawn."""
        if self.is_ending:
            change.close()
            raise ChangeWithdrawn("the service is ending, and changes nothing any more")
        task = asyncio.ensure_future(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise ChangeWithdrawn("the service is ending: the change was withdrawn") from None
            task.add_done_callback(_tell_of_failure)
            raise

    async def abandon(self) -> None:
        """The service is about to end: changes under way are withdrawn, as they may take for ever, and none is begun any more."""
        self.is_ending = True
        for change in self._changes:
            change.cancel()
        if self._changes:
            await asyncio.wait(self._changes, timeout=timing.ABANDON_S)
