"""Whether a call is made again, and when. Pure but for chance, `now` is an argument: both clients wait in their own way."""

from __future__ import annotations

import random
from typing import Final

from moeserve.errors import DeadlineExceeded, ExpertUnavailable, MoEServeError, ServiceUnreachable

#: how long nobody may answer at a target where nobody has before: it may be mistyped
_AWAY_S: Final = 5.0
#: how long a call without limit waits for a service that is started again
_RESTART_S: Final = 30.0
#: how often a call is made that a service cannot answer, without saying when it will be able to
_ATTEMPTS: Final = 4
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.5
#: for an attempt that begins when the time of its call is over: it ends as one that took too long
_SHORTEST_ATTEMPT_S: Final = 0.001


class Retries:
    """Of one call that may be run twice without harm, from `now` on; `timeout_s` None = without limit.

    A refusal that says when to try again is followed, as long as that is within the time the call has. So is a service tried that has
    answered before and cannot be reached, or is starting or draining: how long that takes nobody knows, and how long it is worth to wait
    the caller has said. Where nobody has answered yet that ends after some seconds. One that lacks experts is tried a few times. Pauses
    grow at random by up to a half, so that callers who were refused together do not return together.
    """

    def __init__(self, timeout_s: float | None, now: float) -> None:
        self._timeout_s, self._began = timeout_s, now
        self._away_since: float | None = None
        #: since when calls have ended for want of experts, and how many have
        self._lacking_since: float | None = None
        self._attempts = 0
        self._next_pause_s = _FIRST_PAUSE_S

    def left_s(self, now: float) -> float | None:
        """What an attempt may take; None = without limit."""
        if self._timeout_s is None:
            return None
        return max(self._timeout_s - (now - self._began), min(self._timeout_s, _SHORTEST_ATTEMPT_S))

    def pause_s(self, error: MoEServeError, now: float, *, is_known: bool = False) -> float | None:
        """How long to wait before the next attempt; None = `error` is what became of the call.

        is_known: the service has answered at this target, be it to say that it starts.
        """
        if isinstance(error, ExpertUnavailable):
            pause_s = self._until_back_s(error, now, is_known)
        else:
            pause_s, self._next_pause_s = error.retry_after_s, _FIRST_PAUSE_S
            self._away_since = self._lacking_since = None
        if pause_s is None:
            return None
        pause_s *= random.uniform(1, 1.5)  # noqa: S311  # nobody has to be unable to guess it
        left_s = self.left_s(now)
        return pause_s if left_s is None or pause_s < left_s else None

    def ended(self, error: MoEServeError) -> MoEServeError:
        """What its caller hears of `error`: a time is that of all attempts together."""
        return DeadlineExceeded.of(error.target, self._timeout_s) if isinstance(error, DeadlineExceeded) and error.target else error

    def _until_back_s(self, error: ExpertUnavailable, now: float, is_known: bool) -> float | None:
        if isinstance(error, ServiceUnreachable) or error.retry_after_s is not None:
            self._away_since = now if self._away_since is None else self._away_since
            ends = self._away_since + self._patience_s(is_known)
            may_return = not isinstance(error, ServiceUnreachable) or error.may_return
        else:
            self._attempts += 1
            self._lacking_since = now if self._lacking_since is None else self._lacking_since
            ends, may_return = self._lacking_since + _AWAY_S, self._attempts < _ATTEMPTS
        if not may_return or now > ends:
            return None
        pause_s, self._next_pause_s = self._next_pause_s, min(2 * self._next_pause_s, _LONGEST_PAUSE_S)
        return pause_s

    def _patience_s(self, is_known: bool) -> float:
        if not is_known:
            return _AWAY_S
        return _RESTART_S if self._timeout_s is None else self._timeout_s
