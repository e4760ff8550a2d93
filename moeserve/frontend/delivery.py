"""Who owes what of one batch: the table of its parcels, and the only writer of what is pending, answered, lost, late or given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf

from moeserve.api.call_trace import CallTrace, HostTimes
from moeserve.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest, MoEServeError, Overloaded
from moeserve.frontend.parcel import Answer, Parcel, ParcelState, Sent, Suspicion, Way
from moeserve.frontend.routed import Part
from moeserve.layer.dispatch import HostWork
from moeserve.transport import ChannelClosed, PeerLost

#: what the request or this process is to blame for: no other host would say otherwise, unless it has been asked already
_OF_THE_BATCH = (InvalidRequest, DeadlineExceeded)

#: event loops may call a moment early
_CLOCK_S = 0.001


class Delivery:
    """All that hosts owe to one batch until `deadline`, monotonic seconds. To be used on the event loop; only `change` waits.

    traces: of requests of the batch, by those who want to know where the time goes
    """

    def __init__(self, deadline: float, traces: Sequence[CallTrace] = ()) -> None:
        self.deadline, self.traces = deadline, traces
        self._open: dict[Parcel, None] = {}
        self._pending: dict[Part, int] = {}
        self._answers: dict[Part, list[Answer]] = {}
        self._failure: Exception | None = None
        #: of hosts whose sums were refused
        self.suspicions: list[Suspicion] = []
        #: hosts that have answered rows of their own with an error, once for each, also where another copy's answer counts
        self.errors: list[tuple[int, MoEServeError]] = []
        #: called when all is answered, in the very turn of the event loop in which the last answer has come
        self.when_whole: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._has_changed = False
        #: monotonic seconds: when the first parcel was answered
        self.first_answer_at = inf

    @property
    def owed(self) -> list[Parcel]:
        """What is neither answered nor given up."""
        return list(self._open)

    def is_owed(self, parcel: Parcel) -> bool:
        """Whether it is neither answered nor given up."""
        return parcel in self._open

    @property
    def is_under_way(self) -> bool:
        """Whether something is owed, or has come and was not taken."""
        return bool(self._open or self._answers)

    @property
    def has_lost(self) -> bool:
        """Whether nobody computes some of it."""
        return any(parcel.state is ParcelState.LOST for parcel in self._open)

    @property
    def is_all_lost(self) -> bool:
        """Whether nothing of it is under way, or has come and was not taken, and something is owed."""
        return bool(self._open) and not self._answers and all(parcel.state is ParcelState.LOST for parcel in self._open)

    def needs_remedy(self, at: float) -> bool:
        """Whether something is lost, or it is the time `at`, monotonic seconds, when something may be late."""
        return self.has_lost or time.monotonic() >= at - _CLOCK_S

    def send(self, part: Part, works: Sequence[HostWork], sent: Sent, again: Parcel | None = None) -> None:
        """`works` are under way in one message; they were of the parcel `again` before."""
        parcel = self._add(part, works, again)
        self._pending[part] = self._pending.get(part, 0) + 1
        self.hedge(parcel, Way((sent,)))

    def hedge(self, parcel: Parcel, way: Way) -> None:
        """One more way to answer all of a parcel; nobody waits for it if the parcel is owed no longer."""
        if not self.is_owed(parcel):
            way.cancel()
            return
        parcel.ways.append(way)
        parcel.since = time.monotonic()
        for sent in way.sent:
            sent.future.when_answered(partial(self._returned, parcel, way, sent))

    def lose(
        self, part: Part, work: HostWork, again: Parcel | None = None, *, is_must: bool = False, error: Overloaded | None = None
    ) -> None:
        """`work` is not under way, or not any more; it was of the parcel `again` before.

        Its host is down, or is not to be waited for, or has no room for it: the `error` says so.
        """
        parcel = self._add(part, (work,), again)
        parcel.state, parcel.is_must = ParcelState.LOST, parcel.is_must or is_must
        if error is not None:
            parcel.error, parcel.erred = error, parcel.erred | {work.host}
        self.wake()

    def close(self, parcel: Parcel, state: ParcelState) -> None:
        """It is owed no longer: it was answered, or given up, or other parcels have taken its place."""
        if parcel.state is ParcelState.PENDING:
            self._pending[parcel.part] -= 1
        parcel.state = state
        del self._open[parcel]
        for way in parcel.ways:
            way.cancel()
        if parcel.part in self._answers and not self._pending.get(parcel.part):
            self.wake()

    def refuse(self, answers: Iterable[Answer]) -> None:
        """These sums are not finite: what they were to answer is lost, until another copy has said whether it must be so."""
        for answer in answers:
            parcel = self._add(answer.parcel.part, answer.works, answer.parcel)
            parcel.state, parcel.refused = ParcelState.LOST, [answer]
            if len(answer.works) == 1:  # else they may be another's: each is asked by itself
                self.suspicions.append(Suspicion(answer.host, answer.parcel.part))
                parcel.erred, parcel.suspects = parcel.erred | {answer.host}, parcel.suspects | {self.suspicions[-1]}
            self.wake()

    def accept(self, parcel: Parcel) -> None:
        """What was refused counts: nobody says otherwise."""
        for suspicion in parcel.suspects:
            suspicion.is_cleared = True
        self._answers.setdefault(parcel.part, []).extend(answer._replace(is_final=True) for answer in parcel.refused)
        self.close(parcel, ParcelState.ANSWERED)
        self.wake()

    def take_answers(self) -> dict[Part, list[Answer]]:
        """What has come since it was asked last, of parts of which nothing is under way."""
        whole = [part for part in self._answers if not self._pending.get(part)]
        return {part: self._answers.pop(part) for part in whole}

    def take_all_answers(self) -> dict[Part, list[Answer]]:
        """What has come since it was asked last."""
        answers, self._answers = self._answers, {}
        return answers

    def wake(self) -> None:
        """Something has changed that `change` waits for: here, or with the hosts."""
        self._has_changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def change(self, wake_at: float = inf) -> None:
        """Until a part was answered, something was lost, a host came back, or it is `wake_at`, monotonic seconds.

        Raises what the batch itself is to blame for.
        """
        if not self._has_changed:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_at(wake_at, self.wake) if wake_at < inf else None
            try:
                await self._waiter
            finally:
                if timer is not None:
                    timer.cancel()
        self._has_changed = False
        if self._failure is not None:
            # The future that raised it keeps it: with its frames it would keep the batch, until cycles of references are collected.
            raise self._failure.with_traceback(None)

    def cancel(self) -> None:
        """Nobody waits for anything any longer."""
        self.when_whole = None
        for parcel in self.owed:
            self.close(parcel, ParcelState.GIVEN_UP)

    def _add(self, part: Part, works: Sequence[HostWork], again: Parcel | None) -> Parcel:
        parcel = Parcel(part, works, time.monotonic())
        if again is not None:
            parcel.behind = again.behind
            parcel.erred, parcel.suspects, parcel.is_must = again.erred, again.suspects, again.is_must
        self._open[parcel] = None
        return parcel

    def _returned(self, parcel: Parcel, way: Way, sent: Sent) -> None:
        if sent.future.cancelled() or parcel.state is not ParcelState.PENDING or way.is_lost:
            return
        error = sent.future.exception()
        if error is None:
            if way.is_whole:
                self._answered(parcel, way)
        elif isinstance(error, _OF_THE_BATCH) and all(each.is_lost for each in parcel.ways if each is not way):
            self._failure = error
            self.wake()
        else:
            self._lost(parcel, way, sent, error)

    def _answered(self, parcel: Parcel, way: Way) -> None:
        answers = self._answers.setdefault(parcel.part, [])
        answers += [Answer(parcel, sent.host, sent.works, sent.rows, sent.future.result().tensor) for sent in way.sent]
        self.first_answer_at = min(self.first_answer_at, time.monotonic())
        parcel.has_hedge_won = way is not parcel.ways[0]
        self.close(parcel, ParcelState.ANSWERED)
        for trace in self.traces:
            self._note(trace, parcel, way)
        if not self._open and self.when_whole is not None:
            try:
                self.when_whole()
            except Exception as error:  # whoever waits for the delivery gets it
                self._failure = error
        if not self._pending[parcel.part]:
            self.wake()

    def _note(self, trace: CallTrace, parcel: Parcel, way: Way) -> None:
        """When hosts have computed a parcel, and that nothing of its part is under way any more."""
        now = time.monotonic()
        for sent in way.sent:
            if (times := sent.future.result().times) is not None:
                trace.hosts.append(HostTimes(sent.host, len(sent.rows), sent.at, times.began_ns / 1e9, times.ended_ns / 1e9, now))
        if not self._pending[parcel.part]:
            trace.mark("hosts")

    def _lost(self, parcel: Parcel, way: Way, sent: Sent, error: BaseException) -> None:
        way.is_lost = True
        way.cancel()
        if not isinstance(error, (ChannelClosed, PeerLost, *_OF_THE_BATCH)):
            assert isinstance(error, MoEServeError)
            if len(sent.works) == 1:
                parcel.erred |= {sent.host}
            # A host that has nothing of this epoch yet, or any more, is no worse than one that is down.
            if isinstance(error, ExpertUnavailable):
                parcel.behind = str(error)
            else:
                parcel.error = error
                if len(sent.works) == 1:  # else it may be another's
                    self.errors.append((sent.host, error))
        if not all(each.is_lost for each in parcel.ways):
            return
        self._pending[parcel.part] -= 1
        parcel.state, parcel.since = ParcelState.LOST, time.monotonic()
        self.wake()
