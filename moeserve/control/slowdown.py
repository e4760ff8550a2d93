"""Whether calls have become slower since a round of balancing began. No clock of its own.

B counts of calls by how long they took, as in `CallTimes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moeserve.control.counting import Counts, Fading, Increments
from moeserve.observe.call_times import BOUNDS_S, NUM_TIMES

#: of which one call in a hundred is slower is what callers notice; it may become 1.5 times as slow, which is so many bounds
_QUANTILE: Final = 0.99
_BOUNDS: Final = 2
#: fewer calls say nothing of one in a hundred
_FEWEST: Final = 100
#: of a normal distribution: what differs by less may be chance
_DEVIATIONS: Final = 3.0

Times = npt.NDArray[Any]


class Slowdown:
    """Compares the calls of a round with those of `window_s` before it, which are not of other rounds."""

    def __init__(self, window_s: float) -> None:
        self._new = Increments()
        self._before = Fading([NUM_TIMES], window_s)
        self._during: Times | None = None

    def hear(self, counted: Mapping[str, Counts], now: float) -> None:
        """Takes what each frontend that follows now has counted since it started: one array [B]."""
        new = self._new.hear(counted)
        if self._during is None:
            self._before.add(new, now)
        else:
            self._during = self._during + sum(each for (each,) in new)

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round is under way. What has been heard before is of the time before."""
        self._during = np.zeros(NUM_TIMES)
        try:
            yield
        finally:
            self._during = None

    def sentence(self, now: float) -> str | None:
        """What has become slower, while a round is under way; None = nothing, or it is not certain."""
        (before,), during = self._before.at(now), self._during
        if during is None or not is_slower(before, during):
            return None
        was, now_is = (f"{1000 * BOUNDS_S[min(_quantile(times), NUM_TIMES - 2)]:.1f} ms" for times in (before, during))
        return f"one call in a hundred takes more than {now_is} since the round began, and {was} before"


def is_slower(before: Times, during: Times) -> bool:
    """Whether the 99th percentile of `during` [B] is certainly more than 1.5 times that of `before` [B].

    Of either, the share of calls that take longer than 1.5 times the percentile of `before` is known up to an interval (E. B. Wilson,
    1927). It is certain if the share in `during` is more than one in a hundred, and more than that in `before`, wherever in their
    intervals they are.
    """
    if min(before.sum(), during.sum()) < _FEWEST:
        return False
    slow = _quantile(before) + _BOUNDS + 1
    _, most_before = _interval(before[slow:].sum(), before.sum())
    least_during, _ = _interval(during[slow:].sum(), during.sum())
    return bool(least_during > max(1 - _QUANTILE, most_before))


def _quantile(times: Times) -> int:
    """The number of the first bound that 99% of the calls keep."""
    return int(np.searchsorted(np.cumsum(times), _QUANTILE * times.sum()))


def _interval(some: float, total: float) -> tuple[float, float]:
    """The share of some in all of a kind, of which `total` have been seen: at least, at most."""
    square = _DEVIATIONS**2
    middle = some + square / 2
    spread = _DEVIATIONS * math.sqrt(some * (total - some) / total + square / 4)
    return (middle - spread) / (total + square), (middle + spread) / (total + square)
