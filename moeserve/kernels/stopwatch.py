"""Times several ways to do the same thing on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


def fastest_of(candidates: Mapping[Key, Callable[[], object]], rounds: int = 3, ends_at: float = math.inf) -> dict[Key, float]:
    """Seconds of the fastest of `rounds` runs of each; they take turns, so that other load on the machine affects all of them.

    After `ends_at`, monotonic seconds, no round but the first begins.
    """
    best = dict.fromkeys(candidates, math.inf)
    for number in range(rounds):
        if number and time.monotonic() > ends_at:
            break
        for key, run in candidates.items():
            start = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - start)
    return best
