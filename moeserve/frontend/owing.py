"""What one host owes its frontend at present, and how long it usually takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from math import inf
from typing import NamedTuple, Protocol

from moeserve.frontend.health import UsualDurations
from moeserve.transport import Partial


class Gauge(Protocol):
    """A number that people see."""

    def set(self, value: float) -> None:
        """Now it is `value`."""
        ...


class Debt(NamedTuple):
    """A message that was not answered yet."""

    rows: int
    sent_at: float


class Owing:
    """Counts what was sent to a host and not answered; `gauge` shows the rows."""

    def __init__(self, gauge: Gauge) -> None:
        self.rows = 0
        self.durations = UsualDurations()
        self._gauge = gauge
        #: the oldest first
        self._debts: dict[asyncio.Future[Partial], Debt] = {}
        self._answered_at = 0.0

    def add(self, answered: asyncio.Future[Partial], rows: int) -> None:
        """The host owes answers to `rows` more, until it has given them or nobody waits any longer."""
        self._debts[answered] = Debt(rows, time.monotonic())
        self._count(rows)
        answered.add_done_callback(self._done)

    def is_late(self, now: float, given_up: Iterable[tuple[int, float]]) -> bool:
        """Whether it has not answered something that it would have answered by now, as a rule.

        `given_up`: what nobody waits for any more and it has not answered either, rows and when they were sent.
        """
        return any(now > sent_at + self.durations.late_after_s(rows) for rows, sent_at in (*self._debts.values(), *given_up))

    def silent_since(self) -> float:
        """Since when it owes something and has answered nothing, monotonic seconds; inf while it owes nothing."""
        oldest = next(iter(self._debts.values()), None)
        return inf if oldest is None else max(oldest.sent_at, self._answered_at)

    def _done(self, answered: asyncio.Future[Partial]) -> None:
        debt, now = self._debts.pop(answered), time.monotonic()
        self._count(-debt.rows)
        if not answered.cancelled() and answered.exception() is None:
            self._answered_at = now
            self.durations.record(debt.rows, now - debt.sent_at)

    def _count(self, rows: int) -> None:
        self.rows += rows
        self._gauge.set(self.rows)
