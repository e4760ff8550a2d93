"""The audit log of a controller: what was changed, why, what that moved, and how it ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from moeserve.control.rounds import RoundStopped
from moeserve.errors import ExpertUnavailable
from moeserve.loops import Notifier
from moeserve.observe.audit import ADMINISTRATOR, AuditEvent, Ending
from moeserve.placement import Transition
from moeserve.release import Release

log = logging.getLogger(__name__)

#: a change per minute for most of a day
_MAX_EVENTS: Final = 1000
#: of them, for the next controller: it reads them with its state, which is saved several times during a change
_MAX_SAVED: Final = 200
#: texts may come from callers
_MAX_CHARS: Final = 500


class ChangeWithdrawn(ExpertUnavailable):
    """The service is ending: a change is not made, or not to its end."""


class ChangeStopped(ExpertUnavailable):
    """A change that is made in steps goes no further; what the first ones have moved stays. cost: what that was."""

    def __init__(self, why: str, cost: Transition | None) -> None:
        super().__init__(why)
        self.cost = cost


@dataclass(frozen=True, eq=False)
class BroughtIn:
    """A change that is in force. cost: what it moved; None = nothing."""

    release: Release
    cost: Transition | None = None


@dataclass(frozen=True)
class Begun:
    """A change that has been asked for, and since when; the texts are as in `AuditEvent`."""

    kind: str
    what: str
    why: str = ADMINISTRATOR
    time_unix_s: float = field(default_factory=time.time)
    since: float = field(default_factory=time.monotonic)


class AuditLog:
    """The latest events. `epoch` returns that of the placement in force."""

    def __init__(self, epoch: Callable[[], int]) -> None:
        self._epoch = epoch
        self._events: deque[AuditEvent] = deque(maxlen=_MAX_EVENTS)
        self._number = 0
        self._added = Notifier()
        #: by kind
        self._latest: dict[str, AuditEvent] = {}
        self._save: Callable[[tuple[AuditEvent, ...]], None] = lambda _: None

    def go_on(self, earlier: Sequence[AuditEvent], save: Callable[[tuple[AuditEvent, ...]], None]) -> None:
        """From the events that an earlier controller saved; `save` receives the latest ones for the next controller."""
        for event in earlier:
            self._add(event)
        self._save = save

    async def recorded(self, begun: Begun, change: Callable[[], Awaitable[BroughtIn]]) -> Release:
        """Makes a change, and records how it ended. Raises what it raises."""
        try:
            done = await change()
        except BaseException as error:  # a cancelled one, too
            self.end(begun, error.cost if isinstance(error, ChangeStopped) else None, error)
            raise
        self.end(begun, done.cost)
        return done.release

    def end(self, begun: Begun, cost: Transition | None = None, error: BaseException | None = None) -> None:
        """Records that it has ended: well, or with `error`.

        What fails by itself again and again for the same reason, and moves nothing, is one event.
        """
        ending = _ending(error)
        event = AuditEvent(
            number=self._number + 1,
            time_unix_s=begun.time_unix_s,
            duration_s=time.monotonic() - begun.since,
            kind=begun.kind,
            what=_line(begun.what),
            why=_line(begun.why),
            outcome=ending,
            error=_line(_sentence(ending, error)),
            epoch=self._epoch(),
            **({} if cost is None else {"moves": cost.moves, "new": cost.new, "moved_bytes": cost.moved_bytes}),
        )
        before = self._latest.get(event.kind)
        is_same = before is not None and _reason(before) == _reason(event)
        has_moved = cost is not None and cost.moves + cost.new > 0
        if is_same and error is not None and begun.why != ADMINISTRATOR and not has_moved:
            return
        self._add(event)
        log.info("audit: %s", event)
        try:
            self._save(tuple(self._events)[-_MAX_SAVED:])
        except Exception as why:  # any error, of Ray for example: what was changed is in force all the same
            log.warning("the audit log could not be saved: %r", why)

    def _add(self, event: AuditEvent) -> None:
        self._number = event.number
        self._latest[event.kind] = event
        self._events.append(event)
        self._added.notify()

    async def events(self, until: asyncio.Event | None = None) -> AsyncGenerator[AuditEvent]:
        """The oldest first; then new ones, until that is set. A reader that is too slow misses the oldest of those it has not got."""
        told = 0
        stopping = None if until is None else asyncio.create_task(until.wait())
        if stopping is not None:
            stopping.add_done_callback(lambda _: self._added.notify())
        try:
            while True:
                is_over = until is None or until.is_set()
                new = [event for event in self._events if event.number > told]
                for event in new:
                    yield event
                    told = event.number
                if is_over:
                    return
                if not new:
                    await self._added.wait()
        finally:
            if stopping is not None:
                stopping.cancel()


def _reason(event: AuditEvent) -> tuple[str, str, str]:
    """How it ended and why. What comes after who asked for it, as autoscaling does, are figures, which are others each time."""
    return event.outcome, event.error, event.why.partition(":")[0]


def _ending(error: BaseException | None) -> Ending:
    if error is None:
        return "done"
    if isinstance(error, ChangeWithdrawn | asyncio.CancelledError):
        return "withdrawn"
    return "stopped" if isinstance(error, RoundStopped | ChangeStopped) else "failed"


def _sentence(ending: Ending, error: BaseException | None) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "the service was ending"
    return "" if ending == "done" else str(error) or type(error).__name__


def _line(text: str) -> str:
    """One line that a terminal can show and a message can hold."""
    cut = text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…"
    return "".join(each if each.isprintable() else " " for each in cut)
