"""The time that a host spends in passes."""

from __future__ import annotations

import time

from moeserve.observe.stats import PassTime


class PassClock:
    """Runs from its creation. One thread calls `begin` and `end`; any thread may `read`."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()
        #: seconds with a pass until none ran, and since when one runs again; replaced as a whole, because other threads read it
        self._state: tuple[float, float | None] = 0.0, None
        self._running = 0

    def begin(self) -> None:
        """A pass begins, perhaps beside another."""
        self._running += 1
        if self._running == 1:
            self._state = self._state[0], time.monotonic()

    def end(self) -> None:
        """A pass has ended."""
        busy_s, began = self._state
        assert began is not None, "a pass that has begun"
        self._running -= 1
        if not self._running:
            self._state = busy_s + time.monotonic() - began, None

    def read(self) -> PassTime:
        """Until now."""
        (busy_s, began), now = self._state, time.monotonic()
        return PassTime(self._since_s, now, busy_s if began is None else busy_s + max(0.0, now - began))
