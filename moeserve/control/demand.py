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

from moeserve.control.counting import Counts, Fading, Increments
from moeserve.errors import InvalidRequest

#: what is latest is a quarter of the window
_LATEST: Final = 4.0
#: the share of rows that must go to other experts; of a set of experts that is exchanged for another, about twice as many do
_TURNED: Final = 0.3
#: how unlikely it is that so large a share does by chance: e to the power of minus this
_UNLIKELY: Final = 14.0


@dataclass(frozen=True, eq=False)
class LayerLoads:
    """What is asked of each layer: rows per second of each expert [E], and the balancedness of its hosts, None = nobody asks."""

    rows_per_s: Sequence[npt.NDArray[np.float64]]
    host_balancedness: Sequence[float | None]


class Demand:
    """Rows of each layer and expert, which fade: 95% of what counts under a steady load is younger than `window_s`.

    When callers turn to other experts, what they asked before is forgotten at once.

    num_experts: E of each layer
    """

    def __init__(self, num_experts: Sequence[int], window_s: float) -> None:
        self._shape = list(num_experts)
        self._new = Increments()
        self._rows, self._latest = Fading(num_experts, window_s), Fading(num_experts, window_s / _LATEST)
        self._window_s = window_s
        #: of each layer, when callers have turned to other experts last
        self._turned_at = [-math.inf] * len(num_experts)

    def hear(self, counted: Mapping[str, Counts], now: float) -> None:
        """Takes what each frontend that follows now has counted since it started, [E] of each layer; `now` in seconds.

        The first counts of a frontend are where it starts from. What a frontend has asked that left stays in the window. Raises
        InvalidRequest when counts are not of these layers; then nothing is taken.
        """
        for frontend, counts in counted.items():
            if [len(each) for each in counts] != self._shape:
                raise InvalidRequest(f"frontend {frontend} counts other experts than those that are served", "requested")
        new = self._new.hear(counted)
        self._rows.add(new, now)
        self._latest.add(new, now)

    def turned(self, now: float) -> set[int]:
        """Layers whose callers have turned to other experts since this was asked last: only what they ask now counts from now on.

        A layer turns once in a window at most: what goes to and fro faster than that is evened out.
        """
        turned = set()
        for layer, (rows, latest) in enumerate(zip(self._rows.at(now), self._latest.at(now), strict=True)):
            # Of a row that is x windows old: e^-3x - e^-12x, so the youngest do not count as older.
            if now >= self._turned_at[layer] + self._window_s and differ(rows - latest, latest):
                turned.add(layer)
                self._turned_at[layer] = now
                self._rows.replace(layer, latest, now)
        return turned

    def rows(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer, as they weigh now."""
        return self._rows.at(now)

    def rows_per_s(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer; right under a steady load."""
        return [rows / self._rows.fade_s for rows in self._rows.at(now)]


def differ(older: npt.NDArray[np.float64], latest: npt.NDArray[np.float64]) -> bool:
    """Whether a large share of the rows of `latest` [E] certainly goes to other experts than those of `older` [E].

    The share is the total variation distance of the two distributions. Of n rows at random, the mean distance from where they are from is
    at most sqrt(E / n) / 2, and it is exceeded by more than t with a probability of at most exp(-2 n t^2) (C. McDiarmid, 1989).
    """
    num_older, num_latest = older.sum(), latest.sum()
    if min(num_older, num_latest) < 1:
        return False
    share = np.abs(older / num_older - latest / num_latest).sum() / 2
    rows = 1 / (1 / num_older + 1 / num_latest)
    by_chance = math.sqrt(len(older) / rows) / 2 + math.sqrt(_UNLIKELY / (2 * rows))
    return bool(share > _TURNED + by_chance)
