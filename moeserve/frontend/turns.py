"""The turns of a request that is cut: between them, requests of others run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Turns:
    """Each is of so many tokens, in their order. Whoever runs the request anew has the turns that were given already at once."""

    def __init__(self) -> None:
        #: by the token that each begins with: the token after its last
        self._ends: dict[int, int] = {}
        self._open: dict[int, Callable[[bool], None]] = {}
        self._num_tokens = 0
        self._is_closed = False
        self._given = asyncio.Event()

    def give(self, tokens: int, end: Callable[[bool], None]) -> None:
        """The next `tokens` may run; `end` is called when they were computed (True), or when nobody waits for that (False)."""
        start, self._num_tokens = self._num_tokens, self._num_tokens + tokens
        self._ends[start] = self._num_tokens
        if self._is_closed:
            asyncio.get_running_loop().call_soon(end, False)
        else:
            self._open[start] = end
        self._given.set()

    async def end_of(self, start: int) -> int:
        """Waits for the turn that begins with the token `start`; returns the token after its last."""
        while start not in self._ends:
            self._given.clear()
            await self._given.wait()
        return self._ends[start]

    def computed(self, start: int) -> None:
        """The tokens of the turn from `start` on were computed."""
        if (end := self._open.pop(start, None)) is not None:
            end(True)

    def close(self) -> None:
        """Nobody waits any more until what was given is computed, or what will be."""
        self._is_closed = True
        while self._open:
            _, end = self._open.popitem()
            end(False)
