"""What callers ask of the experts, as all frontends count it. No clock of its own.

E experts of a layer that live on hosts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from moeserve.errors import InvalidRequest

Counts = Sequence[npt.NDArray[np.int64]]

#: e to the power of minus this is a twentieth
_FADES: Final = 3.0


@dataclass(frozen=True, eq=False)
class LayerLoads:
    """What is asked of each layer: rows per second of each expert [E], and the balancedness of its hosts, None = nobody asks."""

    rows_per_s: Sequence[npt.NDArray[np.float64]]
    host_balancedness: Sequence[float | None]


class Demand:
    """Rows of each layer and expert, which fade: 95% of what counts under a steady load is younger than `window_s`.

    num_experts: E of each layer
    """

    def __init__(self, num_experts: Sequence[int], window_s: float) -> None:
        #: rows that are so old weigh 1/e
        self._fade_s = window_s / _FADES
        self._rows = [np.zeros(number) for number in num_experts]
        self._at: float | None = None
        #: of each frontend, its counts when it was heard last
        self._counted: dict[str, Counts] = {}

    def hear(self, counted: Mapping[str, Counts], now: float) -> None:
        """Takes what each frontend that follows now has counted since it started, [E] of each layer; `now` in seconds.

        The first counts of a frontend are where it starts from, as are counts below those before. A frontend that is not named has left;
        what it asked stays in the window. Raises InvalidRequest when counts are not of these layers; then nothing is taken.
        """
        shape = [len(rows) for rows in self._rows]
        for frontend, counts in counted.items():
            if [len(each) for each in counts] != shape:
                raise InvalidRequest(f"frontend {frontend} counts other experts than those that are served", "requested")
        self._rows = self._aged(now)
        self._at = now
        for frontend in counted.keys() & self._counted.keys():
            asked = [new - old for new, old in zip(counted[frontend], self._counted[frontend], strict=True)]
            if all((each >= 0).all() for each in asked):
                self._rows = [rows + each for rows, each in zip(self._rows, asked, strict=True)]
        self._counted = dict(counted)

    def rows(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer, as they weigh now."""
        return self._aged(now)

    def rows_per_s(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer; right under a steady load."""
        return [rows / self._fade_s for rows in self._aged(now)]

    def _aged(self, now: float) -> list[npt.NDArray[np.float64]]:
        weight = 1.0 if self._at is None else math.exp((self._at - now) / self._fade_s)
        return [weight * rows for rows in self._rows]
