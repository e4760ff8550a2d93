"""Who gets in: within a fair share of the tokens that may wait, and in time to be answered before its deadline.

Pure, `now` is an argument. The wait is estimated before a request is let in: the batches ahead of it in fair order, at what they have been
measured to cost. What would be too late is refused at once, rather than left to expire in the queue, as Breakwater (Cho et al., OSDI 2020)
and DAGOR (Zhou et al., SoCC 2018) refuse by the delay of the queue. The tokens that may wait are shared by dynamic thresholds (Choudhury,
Hahne, IEEE/ACM Transactions on Networking 1998): nobody may hold more than what is free then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

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
        self._require_share(caller, tokens, load, deadline, now)
        if not self.backlog.is_idle:
            wait_s = self.backlog.wait_s(caller, tokens, deadline, load, now)
            if now + CAUTION * wait_s + load.cost(tokens) > deadline:
                raise _too_late(wait_s, deadline - now)
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

    def _require_share(self, caller: Caller, tokens: int, load: LayerLoad, deadline: float, now: float) -> None:
        free = self._max_tokens - self.tokens - tokens
        if free >= 0 and (not caller.held_tokens or caller.held_tokens + tokens <= free):
            return
        if tokens > self._max_tokens:
            raise Overloaded(f"{tokens} tokens are more than server.max_queued_tokens = {self._max_tokens}", retry_after_s=None)
        raise Overloaded(
            f"{self.tokens} tokens are queued, {caller.held_tokens} of them of this caller, and {tokens} more exceed its share of "
            f"server.max_queued_tokens = {self._max_tokens}; try again",
            max(_LEAST_RETRY_S, self.backlog.wait_s(caller, tokens, deadline, load, now)),
        )

    def _add(self, caller: Caller, tokens: int) -> None:
        self.backlog.callers.count_held(caller, tokens)
        self._on_change(self.tokens)


def _too_late(wait_s: float, remaining_s: float) -> Overloaded:
    return Overloaded(
        f"the request is due in {1e3 * remaining_s:.0f} ms, and what is ahead of it takes about {1e3 * wait_s:.0f} ms; try again",
        max(_LEAST_RETRY_S, wait_s),
    )
