"""How long calls take, in few numbers: a frontend counts them, and a controller sees whether they become slower."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

_SHORTEST_S: Final = 1e-4
#: two steps are a factor of 1.5
_STEP: Final = 1.5**0.5
NUM_TIMES: Final = 64
#: in seconds, 0.1 ms to 29 s; the last count is of all calls that took longer
BOUNDS_S: Final = tuple(_SHORTEST_S * _STEP**number for number in range(NUM_TIMES - 1))

#: calls that wait for experts
METHODS: Final = frozenset({"Forward", "ForwardMany", "ForwardStream", "ModelInfer", "ModelStreamInfer"})
#: a refused call is fast, and a caller that leaves says nothing of the service
_CODES: Final = frozenset({"OK", "DEADLINE_EXCEEDED"})


class CallTimes:
    """Counts since the start: counts[i] calls took at most BOUNDS_S[i] and more than the bound before."""

    def __init__(self) -> None:
        self._counts = [0] * NUM_TIMES

    def observe(self, method: str, code: str, seconds: float) -> None:
        """One call was answered."""
        if method in METHODS and code in _CODES:
            self._counts[bisect_left(BOUNDS_S, seconds)] += 1

    def counts(self) -> tuple[int, ...]:
        """As they are now."""
        return tuple(self._counts)
