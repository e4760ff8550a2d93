"""Waiting for something to change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Notifier:
    """Each `notify` wakes all current waiters; for one event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all waiters."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Waits for the next notify."""
        await self._event.wait()

    async def until(self, is_so: Callable[[], object], deadline: float | None = None) -> None:
        """Waits until `is_so` is true, checked now and after each notify; at most until the monotonic time `deadline`, in seconds."""
        while not is_so():
            try:
                async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                    await self.wait()
            except TimeoutError:
                return
