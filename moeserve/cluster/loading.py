"""How far hosts are that load for a change, and are waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from moeserve.cluster.timing import LOADING_LOOK_S


class Loading:
    """`ask` a host, by its number, how many experts it has read since it was started; it need not answer."""

    def __init__(self, ask: Callable[[int], Awaitable[int]]) -> None:
        self._ask = ask
        #: what each has said, of those that are waited for
        self.experts: dict[int, int] = {}

    async def wait(self, number: int, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Until `work`, which is for a host to load, is done. Raises what it raises."""
        self.experts[number] = 0
        looking = asyncio.create_task(self._look(number))
        try:
            await work()
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            self.experts.pop(number, None)

    async def _look(self, number: int) -> None:
        while True:
            await asyncio.sleep(LOADING_LOOK_S)
            self.experts[number] = await self._ask(number)
