"""How many hosts the load needs, and when their number changes. No clock of its own.

hosts x busy / target, where busy is the mean of the hosts' shares of time in passes, is the rule of Kubernetes' horizontal pod autoscaler.
So are the periods for which another number must have been wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moeserve.config import AutoscalingConfig
from moeserve.errors import number_of

#: hosts leave only if those that stay could take so much more: a load that falls by a fifth and comes back moves nothing
_HEADROOM: Final = 1.25
#: of hosts, in one step up
_MOST_GROWTH: Final = 2
#: of a number of hosts, which is not exact
_ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class Bounds:
    """The allowed numbers of hosts, from least to most."""

    least: int
    most: int

    def nearest(self, number: int) -> int:
        """The allowed number that is nearest to `number`."""
        return max(self.least, min(number, self.most))


@dataclass(frozen=True)
class Resize:
    """A decision: `wanted` hosts in place of `hosts`, because the load has needed them for `after_s`.

    busy: the mean of the shares of the hosts that were heard last
    """

    hosts: int
    wanted: int
    busy: float
    after_s: float

    def __str__(self) -> str:
        were = "was" if self.hosts == 1 else "were"
        return f"{number_of(self.hosts, 'host')} {were} {self.busy:.0%} busy, and {self.wanted} have been wanted for {self.after_s:.1f} s"


class Sizing:
    """Decides by the load of the past. After a decision, and after any change of the number of hosts, it begins anew."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self._target = config.target_busy
        self._more, self._fewer = _Period(config.scale_up_after_s, min), _Period(config.scale_down_after_s, max)
        self._hosts = 0

    def decide(self, now: float, hosts: int, shares: Sequence[float | None], bounds: Bounds) -> Resize | None:
        """To be called often. `hosts` should run; `shares` of those that do are how busy each has lately been, 0..1, None = not known.

        Hosts that are not heard count as the others when more are wanted, and as busy all the time when fewer are. So the loss of hosts,
        or of what they say, removes none.
        """
        if hosts != self._hosts:
            self._begin(hosts)
        known = [share for share in shares if share is not None]
        busy = sum(known) / len(known) if known else 0.0
        at_most = sum(known) + max(0, hosts - len(known))
        more, fewer = bounds.nearest(self._needed(len(shares) * busy)), bounds.nearest(self._needed(_HEADROOM * at_most))
        for period, wanted in ((self._more, more if more > hosts else None), (self._fewer, fewer if fewer < hosts else None)):
            since, number = period.hear(now, wanted)
            if number is not None:
                self._begin(hosts)
                return Resize(hosts, min(number, _MOST_GROWTH * hosts), busy, since)
        return None

    def _needed(self, load: float) -> int:
        """Hosts for the work of `load` hosts that are busy all the time."""
        return math.ceil(load / self._target - _ROUNDING)

    def _begin(self, hosts: int) -> None:
        self._hosts = hosts
        for period in (self._more, self._fewer):
            period.hear(0.0, None)


class _Period:
    """For how long another number has been wanted without a break; `nearest` chooses among the numbers of that time."""

    def __init__(self, after_s: float, nearest: Callable[[int, int], int]) -> None:
        self._after_s, self._nearest = after_s, nearest
        self._since: float | None = None
        self._number = 0

    def hear(self, now: float, wanted: int | None) -> tuple[float, int | None]:
        """Seconds, and the number once these are enough; None = no other number is wanted now."""
        if wanted is None:
            self._since = None
            return 0.0, None
        if self._since is None:
            self._since, self._number = now, wanted
        self._number = self._nearest(self._number, wanted)
        lasted_s = now - self._since
        return lasted_s, self._number if lasted_s >= self._after_s else None
