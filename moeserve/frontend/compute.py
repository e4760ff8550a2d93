"""The frontend's own tensor work: on the event loop if it is small, else in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, TypeVarTuple

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

# A hop to the thread and back costs about 0.1 ms, as much as routing, permuting and combining this many elements.
_SMALL_ELEMENTS = 2**17


class Compute:
    """Runs functions of tensors without blocking the event loop for long."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moeserve-compute")

    async def __call__(self, num_elements: float, function: Callable[[*Args], Result], *args: *Args) -> Result:
        """`function(*args)`; always runs to its end: a cancellation that arrives meanwhile is delivered at the next await."""
        if self.is_small(num_elements):
            return function(*args)
        running = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        cancelled = False
        while not running.done():
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()  # it is the same cancellation: a time-out that finds a second one takes it for its caller's
            task.cancel()
        return running.result()

    @staticmethod
    def is_small(num_elements: float) -> bool:
        """Whether so little is done at once, and not in a thread."""
        return num_elements <= _SMALL_ELEMENTS

    def close(self) -> None:
        """Wait for what is running."""
        self._pool.shutdown()
