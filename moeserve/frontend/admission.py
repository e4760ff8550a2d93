"""Who gets in: as long as there is room among the tokens that may wait, and in time to be answered before its deadline.

Pure, `now` is an argument. The wait is estimated before a request is let in: the batches ahead of it in fair order, at what they have been
measured to cost. What would be too late is refused at once, rather than left to expire in the queue, as Breakwater (Cho et al., OSDI 2020)
and DAGOR (Zhou et al., SoCC 2018) refuse by the delay of the queue. When there is no room, whoever holds the most makes room for those who
hold less (Longest Queue Drop: Wei, Coyle, Hsiao, IEEE GLOBECOM 1991): one caller may use all there is as long as nobody else needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from moeserve.errors import Overloaded
from moeserve.frontend.backlog import CAUTION, Backlog, LayerLoad
from moeserve.frontend.callers import Caller

#: nobody is told to come back sooner
_LEAST_RETRY_S: Final = 0.01


class Admission:
    """Of one frontend."""

    def __init__(self, max_tokens: int, on_change: Callable[[float], None]) -> None:
        self.backlog = Backlog()
        self._max_tokens = max_tokens
        self._on_change = on_change

    @property
    def tokens(self) -> int:
        """Admitted and not yet answered, over all layers."""
        return self.backlog.callers.held_tokens

    def admit(self, load: LayerLoad, key: str, tokens: int, deadline: float, now: float) -> Caller:
        """The caller `key`, who holds `tokens` more from now on. Raises Overloaded."""
        caller = self.backlog.callers.seen(key, now)
        if tokens > self._max_tokens:
            raise Overloaded(f"{tokens} tokens are more than server.max_queued_tokens = {self._max_tokens}", retry_after_s=None)
        if not self.backlog.is_idle:
            wait_s = self.backlog.wait_s(caller, tokens, deadline, load, now)
            if now + CAUTION * wait_s + load.request_s(tokens) > deadline:
                raise _too_late(wait_s, deadline - now)
        if (short := self.tokens + tokens - self._max_tokens) > 0:
            self._make_room(caller, tokens, short, now)
        self._add(caller, tokens)
        return caller

    def refusal(self, key: str, deadline: float, now: float) -> Overloaded | None:
        """Why any request of the caller `key` would be refused, however small it is; None = it is worth reading."""
        if not self.backlog.callers.waiting:
            return None
        caller = self.backlog.callers.seen(key, now)
        wait_s = self.backlog.wait_s(caller, 1, deadline, None, now)
        return _too_late(wait_s, deadline - now) if now + CAUTION * wait_s > deadline else None

    def release(self, caller: Caller, tokens: int) -> None:
        """The tokens were answered, failed or given up."""
        self._add(caller, -tokens)

    def _make_room(self, caller: Caller, tokens: int, short: int, now: float) -> None:
        """For `tokens` of `caller`, which are `short` too many."""
        retry_s = max(_LEAST_RETRY_S, self.backlog.all_s(now) * short / self.tokens)
        queued = f"{self.tokens} tokens are queued"
        pushed = self._room_of_others(short, caller.held_tokens + tokens)
        if not pushed:
            raise Overloaded(f"{queued} and {tokens} more exceed server.max_queued_tokens = {self._max_tokens}; try again", retry_s)
        for load, request in pushed:
            load.push_out(request, Overloaded(f"{queued}, most of them of this caller, and others need the room; try again", retry_s))

    def _room_of_others(self, short: int, least: int) -> list[tuple[LayerLoad, Any]]:
        """Waiting requests of whoever holds the most, `short` tokens together, if it holds `least` without them, or more."""
        most = max(self.backlog.callers.waiting, key=lambda caller: caller.held_tokens, default=None)
        found: list[tuple[LayerLoad, Any]] = []
        spare = 0 if most is None else most.held_tokens - least
        for load, request in self.backlog.untaken(most) if most is not None and spare >= short else ():
            if request.tokens <= spare:
                found.append((load, request))
                short, spare = short - request.tokens, spare - request.tokens
                if short <= 0:
                    return found
        return []

    def _add(self, caller: Caller, tokens: int) -> None:
        self.backlog.callers.count_held(caller, tokens)
        self._on_change(self.tokens)


def _too_late(wait_s: float, remaining_s: float) -> Overloaded:
    return Overloaded(
        f"the request is due in {1e3 * remaining_s:.0f} ms, and what is ahead of it takes about {1e3 * wait_s:.0f} ms; try again",
        max(_LEAST_RETRY_S, wait_s),
    )
