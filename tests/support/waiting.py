"""Waiting for what is going to be so: the only way in which a test lets time pass."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Seen = TypeVar("Seen")
PATIENCE_S = 90.0
#: below the 60 s that a call into the loop of a service under test may take: then the condition is what is told
PATIENCE_OF_LOOPS_S = 50.0


def until(holds: Callable[[], Seen], timeout_s: float = PATIENCE_S) -> Seen:
    """What `holds` returns as soon as it is true."""
    end = time.monotonic() + timeout_s
    while not (seen := holds()):
        assert time.monotonic() < end, _never(holds, seen, timeout_s)
        time.sleep(0.01)
    return seen


async def until_async(holds: Callable[[], Seen | Awaitable[Seen]], timeout_s: float = PATIENCE_OF_LOOPS_S) -> Seen:
    """As `until`, on the loop that the condition belongs to."""
    end = time.monotonic() + timeout_s
    while True:
        seen = holds()
        if inspect.isawaitable(seen):
            seen = await seen
        if seen:
            return seen
        assert time.monotonic() < end, _never(holds, seen, timeout_s)
        await asyncio.sleep(0.005)


def _never(holds: Callable[[], object], seen: object, timeout_s: float) -> str:
    try:
        condition = " ".join(inspect.getsource(holds).split())
    except (OSError, TypeError):
        condition = repr(holds)
    return f"not within {timeout_s:g} s, but {seen!r}: {condition}"
