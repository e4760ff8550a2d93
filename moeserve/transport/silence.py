"""When a host that owes answers has been silent for too long, as seen by a frontend."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from moeserve.transport.timing import HEARTBEAT_S


class Watched(Protocol):
    """The other end of a connection. Times are monotonic, in seconds."""

    def owed_since(self) -> float | None:
        """When the oldest unanswered message was sent; None = all are answered."""
        ...

    def last_heard(self) -> float:
        """When it sent something."""
        ...

    def fall_silent(self, silent_s: float) -> None:
        """It owes an answer and has sent nothing for `silent_s`."""
        ...


class SilenceWatch:
    """Checks every HEARTBEAT_S while an answer is owed, and at the very moment at which `silent_after_s` would be over."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0

    def start(self, watched: Watched) -> None:
        """To be called with every message."""
        if self._timer is None:
            self._look_in(min(HEARTBEAT_S, self._silent_after_s), watched)

    def stop(self) -> None:
        """The connection is closed."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_in(self, pause_s: float, watched: Watched) -> None:
        # Only the timer keeps `watched`: without a cycle, a closed channel frees its arena at once.
        due = time.monotonic() + pause_s
        self._timer = self._loop.call_at(due, self._look, due, watched)

    def _look(self, due: float, watched: Watched) -> None:
        self._timer = None
        owed_since = watched.owed_since()
        if owed_since is None:
            return
        now = time.monotonic()
        if now - due > self._silent_after_s / 2:
            # This process was stopped itself, perhaps with its machine; heartbeats may be on their way.
            self._not_before = now
        silent_s = now - max(owed_since, watched.last_heard(), self._not_before)
        if silent_s < self._silent_after_s:
            self._look_in(min(HEARTBEAT_S, self._silent_after_s - silent_s), watched)
        else:
            watched.fall_silent(silent_s)
