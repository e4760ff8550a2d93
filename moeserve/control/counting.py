"""Counts of all frontends as one: each counts since it started, and reports may be lost. No clock of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: numbers that only grow, in arrays of shapes that stay the same; whole ones, but for those of a load that is imagined
Counts = Sequence[npt.NDArray[Any]]

#: e to the power of minus this is a twentieth
_FADES: Final = 3.0
#: what is less is nothing: it would lose its digits, and stay where rounding no longer lets it fade
_LEAST: Final = float(np.finfo(np.float64).tiny)


class Increments:
    """What frontends have counted since they were heard last."""

    def __init__(self) -> None:
        self._counted: dict[str, Counts] = {}

    def hear(self, counted: Mapping[str, Counts]) -> list[Counts]:
        """Takes what each frontend that follows now has counted since it started; a frontend that is not named has left.

        The first counts of a frontend are where it starts from, as are counts below those before.
        """
        both = counted.keys() & self._counted.keys()
        new = [[now - then for now, then in zip(counted[name], self._counted[name], strict=True)] for name in both]
        self._counted = dict(counted)
        return [each for each in new if all((counts >= 0).all() for counts in each)]


class Fading:
    """Sums that fade: 95% of what counts under a steady load is younger than `window_s`. sizes: of each sum, how many numbers."""

    def __init__(self, sizes: Sequence[int], window_s: float) -> None:
        #: what is so old weighs 1/e
        self.fade_s = window_s / _FADES
        self._sums = [np.zeros(size) for size in sizes]
        self._at: float | None = None

    def add(self, increments: Sequence[Counts], now: float) -> None:
        """`now` in seconds."""
        self._sums = self.at(now)
        self._at = now
        for each in increments:
            self._sums = [so_far + new for so_far, new in zip(self._sums, each, strict=True)]

    def replace(self, index: int, sums: npt.NDArray[np.float64], now: float) -> None:
        """One of the sums, as it weighs now."""
        self._sums = self.at(now)
        self._at = now
        self._sums[index] = sums

    def at(self, now: float) -> list[npt.NDArray[np.float64]]:
        """As they weigh then."""
        weight = 1.0 if self._at is None else math.exp((self._at - now) / self.fade_s)
        return [np.where(faded < _LEAST, 0.0, faded) for faded in (weight * sums for sums in self._sums)]
