"""How a host does, as its frontend sees it: how long it takes as a rule, and whether it errs. Pure: the clock is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from moeserve.frontend import timing

_KEPT: Final = 128
#: how many new answers make the quantile of a size out of date
_FRESH: Final = 16
#: of the durations of a size: below it even a host that is late in one pass of twenty is on time
_USUAL_QUANTILE: Final = 0.9
#: a message that takes so many times the usual duration is late, so that rows are rarely computed twice on a fleet that is well
_LATE_FACTOR: Final = 1.2
#: a message that takes so many times the usual duration is not being computed at all
_STUCK_FACTOR: Final = 20.0


@dataclass(frozen=True)
class HostHealth:
    """One host at one moment.

    is_connected   rows can be sent to it, at the epoch that is looked at
    queue_tokens   rows it has been sent and not yet answered
    down_since     monotonic seconds, 0 while it is connected
    why_not        why nobody should wait for it while it is down, "" = it is on its way
    late_after_s   what is late, for a message of a size that was asked for
    """

    name: str
    is_connected: bool
    queue_tokens: int
    down_since: float
    why_not: str
    late_after_s: float


class UsualDurations:
    """How long a host usually takes for a message, by its number of rows; a size counts with others of the same power of two."""

    def __init__(self) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._usual_s: dict[int, float] = {}
        self._recorded: dict[int, int] = {}

    def record(self, rows: int, seconds: float) -> None:
        """A message was answered."""
        size = rows.bit_length()
        self._latest.setdefault(size, deque(maxlen=_KEPT)).append(seconds)
        self._recorded[size] = number = self._recorded.get(size, 0) + 1
        if number % _FRESH == 0:
            ordered = sorted(self._latest[size])
            self._usual_s[size] = ordered[int(_USUAL_QUANTILE * len(ordered))]

    def late_after_s(self, rows: int) -> float:
        """When a message of so many rows is late; never, as long as too few are known."""
        return _LATE_FACTOR * self._usual(rows)

    def stuck_after_s(self, rows: int, hang_after_s: float) -> float:
        """When a host that owes answers to so many rows, and has answered nothing, must be stuck although it says that it lives."""
        return max(timing.STUCK_HANGS * hang_after_s, _STUCK_FACTOR * self._usual(rows))

    def _usual(self, rows: int) -> float:
        size = rows.bit_length()
        if size in self._usual_s:
            return self._usual_s[size]
        smaller = [known for known in self._usual_s if known < size]
        # What costs as much per row as in the largest messages so far, or less.
        return self._usual_s[max(smaller)] * 2.0 ** (size - max(smaller)) if smaller else float("inf")


class Breaker:
    """Opens when a host has erred repeatedly, and is closed again by whoever has tried the host (Nygard, Release It!, 2007)."""

    def __init__(self) -> None:
        self.is_open = False
        self._errors: deque[float] = deque(maxlen=timing.BREAKER_ERRORS)

    def error(self, now: float) -> bool:
        """The host has erred; whether that has opened it."""
        self._errors.append(now)
        is_full = len(self._errors) == timing.BREAKER_ERRORS and now - self._errors[0] <= timing.BREAKER_WINDOW_S
        has_opened = is_full and not self.is_open
        self.is_open |= is_full
        return has_opened

    def close(self) -> None:
        """The host computes as it should."""
        self.is_open = False
        self._errors.clear()
