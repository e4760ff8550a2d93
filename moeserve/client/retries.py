"""Whether a call is made again, and when. Pure but for chance, `now` is an argument: both clients wait in their own way."""

from __future__ import annotations

import random
from typing import Final

from moeserve.errors import DeadlineExceeded, ExpertUnavailable, MoEServeError, ServiceUnreachable

#: how long a service may be away, as one that is started again is
_AWAY_S: Final = 5.0
#: how often a call is made that a service cannot answer, without saying when it will be able to
_ATTEMPTS: Final = 4
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.5
#: for an attempt that begins when the time of its call is over: it ends as one that took too long
_SHORTEST_ATTEMPT_S: Final = 0.001


class Retries:
    """Of one call that may be run twice without harm, from `now` on; `timeout_s` None = without limit.

    A refusal that says when to try again is followed, as long as that is within the time the call has. A service that cannot be reached,
    or is starting or draining, is tried for some seconds more, and one that lacks experts a few times. Pauses grow at random by up to a
    half, so that callers who were refused together do not return together.
    """

    def __init__(self, timeout_s: float | None, now: float) -> None:
        self._timeout_s, self._began = timeout_s, now
        self._away_since: float | None = None
        #: that ended for want of experts
        self._attempts = 0
        self._next_pause_s = _FIRST_PAUSE_S

    def left_s(self, now: float) -> float | None:
        """What an attempt may take; None = without limit."""
        if self._timeout_s is None:
            return None
        return max(self._timeout_s - (now - self._began), min(self._timeout_s, _SHORTEST_ATTEMPT_S))

    def pause_s(self, error: MoEServeError, now: float) -> float | None:
        """How long to wait before the next attempt; None = `error` is what became of the call."""
        if isinstance(error, ExpertUnavailable):
            pause_s = self._until_back_s(error, now)
        else:
            pause_s, self._away_since, self._next_pause_s = error.retry_after_s, None, _FIRST_PAUSE_S
        if pause_s is None:
            return None
        pause_s *= random.uniform(1, 1.5)  # noqa: S311  # nobody has to be unable to guess it
        left_s = self.left_s(now)
        return pause_s if left_s is None or pause_s < left_s else None

    def ended(self, error: MoEServeError) -> MoEServeError:
        """What its caller hears of `error`: a time is that of all attempts together."""
        return DeadlineExceeded.of(error.target, self._timeout_s) if isinstance(error, DeadlineExceeded) and error.target else error

    def _until_back_s(self, error: ExpertUnavailable, now: float) -> float | None:
        if isinstance(error, ServiceUnreachable):
            may_return = error.may_return
        else:
            self._attempts += error.retry_after_s is None
            may_return = error.retry_after_s is not None or self._attempts < _ATTEMPTS
        self._away_since = now if self._away_since is None else self._away_since
        if not may_return or now - self._away_since > _AWAY_S:
            return None
        pause_s, self._next_pause_s = self._next_pause_s, min(2 * self._next_pause_s, _LONGEST_PAUSE_S)
        return pause_s
