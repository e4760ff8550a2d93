"""What callers ask of the experts, as all frontends count it. No clock of its own.

E experts of a layer that live on hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeserve.control.counting import Counts, Fading, Increments
from moeserve.errors import InvalidRequest


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
        self._shape = list(num_experts)
        self._new = Increments()
        self._rows = Fading(num_experts, window_s)

    def hear(self, counted: Mapping[str, Counts], now: float) -> None:
        """Takes what each frontend that follows now has counted since it started, [E] of each layer; `now` in seconds.

        The first counts of a frontend are where it starts from. What a frontend has asked that left stays in the window. Raises
        InvalidRequest when counts are not of these layers; then nothing is taken.
        """
        for frontend, counts in counted.items():
            if [len(each) for each in counts] != self._shape:
                raise InvalidRequest(f"frontend {frontend} counts other experts than those that are served", "requested")
        self._rows.add(self._new.hear(counted), now)

    def rows(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer, as they weigh now."""
        return self._rows.at(now)

    def rows_per_s(self, now: float) -> list[npt.NDArray[np.float64]]:
        """[E] of each layer; right under a steady load."""
        return [rows / self._rows.fade_s for rows in self._rows.at(now)]
