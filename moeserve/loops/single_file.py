"""Work that holds up the event loop, a piece in each of its turns, so that what is due meanwhile is done between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class SingleFile:
    """Pieces of work, first come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def take(self, work: Callable[[], None]) -> None:
        """Does `work`, which raises nothing, in a turn that no other work of these is done in."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._do_one)

    def _do_one(self) -> None:
        self._waiting[0]()
        self._waiting.popleft()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._do_one)
