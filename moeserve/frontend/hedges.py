"""How many rows may be computed twice: a share of all that are sent, never saved up for long."""

from __future__ import annotations

from typing import Final

from moeserve.observe.metrics import Metrics

#: of all rows
_SHARE: Final = 0.05
#: as many messages of the largest size so far may be hedged one after the other
_BURST: Final = 4


class Hedges:
    """The budget of one layer, and what has become of hedges."""

    def __init__(self, metrics: Metrics) -> None:
        self.spare_rows = 0.0
        self._largest = 0
        self._outcomes = {outcome: metrics.hedges.labels(outcome) for outcome in ("won", "lost")}

    def sent(self, rows: int) -> None:
        """So many rows were sent for the first time."""
        self._largest = max(self._largest, rows)
        self.spare_rows = min(self.spare_rows + _SHARE * rows, float(_BURST * self._largest))

    def hedged(self, rows: int) -> None:
        """So many rows were sent a second time."""
        self.spare_rows -= rows

    def ended(self, *, has_won: bool) -> None:
        """A hedged message was answered: by the second copy, or by the first."""
        self._outcomes["won" if has_won else "lost"].inc()
