"""The share of its time that each host has lately spent in passes. No clock of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from moeserve.observe.stats import PassTime


class BusyShares:
    """Of each host over the last `window_s` seconds, by the host's own clock. A host that says nothing new for so long has no share."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        #: of each host, when it was heard and what it said: the latest of before the window first
        self._said: dict[int, deque[tuple[float, PassTime]]] = {}

    def hear(self, said: Mapping[int, PassTime], now: float) -> None:
        """What each host said last, perhaps the same as before; a host that is not named has left."""
        self._said = {number: self._said.get(number, deque()) for number in said}
        for number, heard in self._said.items():
            latest = said[number]
            if heard and latest.since_s != heard[-1][1].since_s:  # another incarnation
                heard.clear()
            if not heard or latest.now_s > heard[-1][1].now_s:
                heard.append((now, latest))
            while len(heard) > 1 and heard[1][0] <= now - self._window_s:
                heard.popleft()

    def shares(self, now: float) -> dict[int, float]:
        """0..1 of each host that has been heard twice, and lately."""
        return {
            number: _share(heard[0][1], heard[-1][1])
            for number, heard in self._said.items()
            if len(heard) > 1 and heard[-1][0] > now - self._window_s
        }


def _share(first: PassTime, last: PassTime) -> float:
    return min(1.0, max(0.0, (last.busy_s - first.busy_s) / (last.now_s - first.now_s)))
