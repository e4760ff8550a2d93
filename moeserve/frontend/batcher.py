"""Joining: who runs with whom, and when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import BatchingConfig
from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.frontend.admission import Admission
from moeserve.frontend.backlog import Flight
from moeserve.frontend.batch import Admitted, Batch
from moeserve.frontend.fair_queue import Turn
from moeserve.frontend.places import BatchPlace, Resting
from moeserve.frontend.turns import Turns
from moeserve.loops import begin

log = logging.getLogger(__name__)

# One batch on the hosts and one on its way: hosts never wait for the frontend, and waiting requests grow into larger batches.
_MAX_IN_FLIGHT = 2


class Batcher:
    """Joins waiting requests of one layer, as many as fit and are in time; never waits while the hosts have nothing of it to do."""

    def __init__(self, run: Callable[[Batch], Awaitable[None]], config: BatchingConfig, admission: Admission) -> None:
        self._run = run
        self._config = config
        self._admission = admission
        self._backlog = admission.backlog
        self._load = self._backlog.add_layer(config.max_batch_tokens, self._pump, self._push_out)
        self._flights: set[Flight] = set()
        self._resting = Resting(config.max_batch_tokens, lambda: len(self._flights) < _MAX_IN_FLIGHT, self._pump)
        self._running: set[asyncio.Future[bool]] = set()
        self._timer: asyncio.TimerHandle | None = None
        #: of the request that has waited longest, or earlier
        self._waiting_since = 0.0
        #: how many hold back what is submitted
        self._holders = 0

    def submit(self, request: LayerRequest, deadline: float) -> asyncio.Future[ForwardOutput]:
        """Admit a request. Raises Overloaded. Cancelling the future gives the request up: one that waits leaves the queue."""
        now = time.monotonic()
        caller = self._admission.admit(self._load, request.caller, request.num_tokens, deadline, now)
        answer: asyncio.Future[ForwardOutput] = asyncio.get_running_loop().create_future()
        admitted = Admitted(request, caller, deadline, answer, now)
        if not self._load.queue:
            self._waiting_since = now
        self._load.queue.add(admitted, self._load.request_s(admitted.tokens))
        answer.add_done_callback(lambda _: self._left(admitted))
        self._pump()
        return answer

    def hold(self) -> None:
        """Requests that are submitted from now on wait for `release`, to join one batch."""
        self._holders += 1

    def release(self) -> None:
        """Ends one `hold`."""
        self._holders -= 1
        self._pump()

    def _left(self, admitted: Admitted) -> None:
        if admitted.is_held:
            admitted.is_held = False
            self._admission.release(admitted.caller, admitted.tokens)
            self._load.queue.remove(admitted)

    def _push_out(self, admitted: Admitted, error: Overloaded) -> None:
        self._left(admitted)
        if not admitted.answer.done():
            admitted.answer.set_exception(error)

    def _pump(self) -> None:
        while self._load.queue and not self._holders and self._has_place() and not self._should_wait():
            now = time.monotonic()
            taken, late = self._backlog.next_batch(self._load, now)
            if not taken and not late:
                break
            for request in late:
                self._push_out(request, Overloaded("the request waited for longer than expected, and is due too soon; try again"))
            if turns := [turn for turn in taken if not turn.request.answer.done()]:
                self._begin(turns, now)

    def _has_place(self) -> bool:
        return len(self._flights) + self._resting.places < _MAX_IN_FLIGHT

    def _should_wait(self) -> bool:
        """While the hosts are busy, a batch that is not full may wait for more requests."""
        if not self._flights or self._load.queue.tokens >= self._config.max_batch_tokens:
            return False
        now = time.monotonic()
        ready_at = max(self._backlog.ready_at(self._load, now), self._waiting_since + self._config.max_batch_wait_ms / 1000)
        if ready_at <= now:
            return False
        if self._timer is None or not now < self._timer.when() <= ready_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(ready_at, self._pump)
        return True

    def _begin(self, turns: Sequence[Turn[Admitted]], now: float) -> None:
        flight = self._backlog.begin(self._load, turns, now)
        self._flights.add(flight)
        end = partial(self._end, flight)
        request, tokens = turns[0]
        if tokens == request.tokens:
            self._launch([turn.request for turn in turns], BatchPlace(self._resting, flight.tokens, end))
            return
        if request.turns is None:
            cut = request.turns = Turns()
            self._launch([request], BatchPlace(self._resting, tokens, lambda _: cut.close()))
        request.turns.give(tokens, end)

    def _end(self, flight: Flight, is_computed: bool) -> None:
        self._flights.discard(flight)
        self._resting.look()
        self._backlog.end(flight, time.monotonic(), is_computed)

    def _launch(self, members: Sequence[Admitted], place: BatchPlace) -> None:
        """Their rows are on their way when this returns, unless that takes long."""
        batch, began = Batch(members, place), time.monotonic()
        running = begin(self._guarded(batch))
        self._backlog.sent(self._load, time.monotonic() - began)
        self._running.add(running)

        def give_up(answer: asyncio.Future[ForwardOutput]) -> None:
            # Whoever gets an output gets it from the batch, which then ends by itself.
            if (answer.cancelled() or answer.exception() is not None) and batch.is_abandoned:
                running.cancel()

        def finished(_: asyncio.Future[bool]) -> None:
            self._running.discard(running)
            place.end(not running.cancelled() and running.result())

        for member in batch.members:
            member.answer.add_done_callback(give_up)
        running.add_done_callback(finished)

    async def _guarded(self, batch: Batch) -> bool:
        """Runs it, whatever comes of it. Returns whether it ended as it should, and somebody got an answer."""
        try:
            await self._run(batch)
        except InvalidRequest as error:
            # The tensors of one member may be at fault; members that run alone do not disturb each other.
            if len(batch.members) == 1:
                batch.fail(error.with_traceback(None))
            for member in batch.members if len(batch.members) > 1 else ():
                await self._guarded(Batch([member], batch.place))
        except MoEServeError as error:
            # The future keeps the error, and with its frames it would keep the batch until reference cycles are collected.
            batch.fail(error.with_traceback(None))
        except Exception as error:  # any error: callers must not hang, and the next batch must run
            log.exception("a batch failed")
            batch.fail(MoEServeError(f"the service failed to run the batch: {type(error).__name__}"))
        else:
            assert batch.is_abandoned, "a batch ended without an answer for every request"
            return any(not answer.cancelled() and answer.exception() is None for answer in (member.answer for member in batch.members))
        return False
