"""Joining: who runs with whom, and when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import BatchingConfig
from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.frontend.admission import Admission
from moeserve.frontend.batch import Admitted, Batch

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
        self._load = self._backlog.add_layer(config.max_batch_tokens, self._pump)
        self._in_flight: set[asyncio.Task[bool]] = set()
        self._timer: asyncio.TimerHandle | None = None
        #: of the request that has waited longest, or earlier
        self._waiting_since = 0.0

    def submit(self, request: LayerRequest, deadline: float) -> asyncio.Future[ForwardOutput]:
        """Admit a request. Raises Overloaded. Cancelling the future gives the request up: one that waits leaves the queue."""
        now = time.monotonic()
        caller = self._admission.admit(self._load, request.caller, request.num_tokens, deadline, now)
        answer: asyncio.Future[ForwardOutput] = asyncio.get_running_loop().create_future()
        admitted = Admitted(request, caller, deadline, answer, now)
        if not self._load.queue:
            self._waiting_since = now
        self._load.queue.add(admitted)
        answer.add_done_callback(lambda _: self._left(admitted))
        self._pump()
        return answer

    def _left(self, admitted: Admitted) -> None:
        self._admission.release(admitted.caller, admitted.tokens)
        self._load.queue.remove(admitted)

    def _pump(self) -> None:
        while self._load.queue and len(self._in_flight) < _MAX_IN_FLIGHT and not self._should_wait():
            now = time.monotonic()
            members, late = self._backlog.next_batch(self._load, now)
            for member in late:
                if not member.answer.done():
                    member.answer.set_exception(Overloaded("the request waited for longer than expected, and is due too soon; try again"))
            if members := [member for member in members if not member.answer.done()]:
                self._launch(Batch(members), now)
            elif not late:
                break

    def _should_wait(self) -> bool:
        """While the hosts are busy, a batch that is not full may wait for more requests."""
        wait_s = self._config.max_batch_wait_ms / 1000
        if not wait_s or not self._in_flight:
            return False
        if self._load.queue.tokens >= self._config.max_batch_tokens:
            return False
        loop = asyncio.get_running_loop()
        ready_at = self._waiting_since + wait_s
        if loop.time() >= ready_at:
            return False
        if self._timer is None or self._timer.cancelled() or self._timer.when() <= loop.time():
            self._timer = loop.call_at(ready_at, self._pump)
        return True

    def _launch(self, batch: Batch, now: float) -> None:
        flight = self._backlog.begin(self._load, batch.members, now)
        task = asyncio.get_running_loop().create_task(self._guarded(batch))
        self._in_flight.add(task)

        def give_up(_: asyncio.Future[ForwardOutput]) -> None:
            if batch.is_abandoned:
                task.cancel()

        def finished(_: asyncio.Task[bool]) -> None:
            self._in_flight.discard(task)
            self._backlog.end(flight, time.monotonic(), not task.cancelled() and task.result())

        for member in batch.members:
            member.answer.add_done_callback(give_up)
        task.add_done_callback(finished)

    async def _guarded(self, batch: Batch) -> bool:
        """Runs it, whatever comes of it. Returns whether it ended as it should."""
        try:
            await self._run(batch)
        except InvalidRequest as error:
            # The tensors of one member may be at fault; members that run alone do not disturb each other.
            if len(batch.members) == 1:
                batch.fail(error.with_traceback(None))
            for member in batch.members if len(batch.members) > 1 else ():
                await self._guarded(Batch([member]))
        except MoEServeError as error:
            # The future keeps the error, and with its frames it would keep the batch until reference cycles are collected.
            batch.fail(error.with_traceback(None))
        except Exception as error:  # any error: callers must not hang, and the next batch must run
            log.exception("a batch failed")
            batch.fail(MoEServeError(f"the service failed to run the batch: {type(error).__name__}"))
        else:
            assert batch.is_abandoned, "a batch ended without an answer for every request"
            return True
        return False
