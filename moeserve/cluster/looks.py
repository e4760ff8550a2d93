"""Looks for hosts: one at a time for each, and which hosts have not answered one for too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from moeserve.cluster.timing import MISSED_S


class Looks:
    """`look` looks for the host of that number, and ends when it has answered."""

    def __init__(self, look: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        self._look = look
        #: those under way, and since when
        self._begun: dict[int, tuple[asyncio.Task[None], float]] = {}

    def begin(self, numbers: Iterable[int]) -> None:
        """Of those hosts of which none is under way."""
        self._begun = {number: (task, since) for number, (task, since) in self._begun.items() if not task.done()}
        for number in set(numbers) - self._begun.keys():
            self._begun[number] = asyncio.create_task(self._look(number)), time.monotonic()

    def missed(self) -> set[int]:
        """Hosts that have not answered for MISSED_S. On a busy machine an answer takes seconds, so that one of less says nothing."""
        now = time.monotonic()
        return {number for number, (task, since) in self._begun.items() if not task.done() and now - since > MISSED_S}

    def end(self) -> None:
        """Cancels those under way."""
        for task, _ in self._begun.values():
            task.cancel()
