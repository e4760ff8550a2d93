"""Times several ways to do the same thing on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


class TimeLimit:
    """So many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether they have passed."""
        return time.monotonic() > self._ends_at


def fastest_of(candidates: Mapping[Key, Callable[[], object]], rounds: int = 3, limit: TimeLimit | None = None) -> dict[Key, float]:
    """Seconds of the fastest of `rounds` runs of each; they take turns, so that other load on the machine affects all of them.

    When `limit` is over, no round but the first begins.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for number in range(rounds):
        if number and limit is not None and limit.is_over:
            break
        for key, run in candidates.items():
            start = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - start)
    return best
