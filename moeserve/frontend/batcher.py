"""Admission and joining of requests."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from moeserve.api.output import ForwardOutput
from moeserve.api.request import LayerRequest
from moeserve.config import BatchingConfig
from moeserve.errors import InvalidRequest, MoEServeError, Overloaded
from moeserve.frontend.batch import Admitted, Batch

log = logging.getLogger(__name__)

# One batch on the hosts and one on its way: hosts never wait for the frontend, and waiting requests grow into larger batches.
_MAX_IN_FLIGHT = 2


class TokenBudget:
    """Tokens admitted and not yet answered, over all layers. Requests beyond the limit are refused at once, never queued silently."""

    def __init__(self, max_tokens: int, on_change: Callable[[float], None]) -> None:
        self._max_tokens = max_tokens
        self._on_change = on_change
        self.tokens = 0

    def take(self, tokens: int) -> None:
        """Raises Overloaded when `tokens` more do not fit."""
        if self.tokens + tokens > self._max_tokens:
            raise Overloaded(
                f"{self.tokens} tokens are queued and {tokens} more exceed server.max_queued_tokens = {self._max_tokens}; try again"
            )
        self.tokens += tokens
        self._on_change(self.tokens)

    def give_back(self, tokens: int) -> None:
        """The tokens were answered, failed or given up."""
        self.tokens -= tokens
        self._on_change(self.tokens)


class Batcher:
    """Joins waiting requests of one layer up to `max_batch_tokens`; never waits while the hosts are idle."""

    def __init__(self, run: Callable[[Batch], Awaitable[None]], config: BatchingConfig, budget: TokenBudget) -> None:
        self._run = run
        self._config = config
        self._budget = budget
        #: the oldest first; a mapping, because cancelled requests leave from the middle
        self._waiting: OrderedDict[Admitted, None] = OrderedDict()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, request: LayerRequest, deadline: float) -> asyncio.Future[ForwardOutput]:
        """Admit a request. Raises Overloaded. Cancelling the future gives the request up: one that waits leaves the queue."""
        self._budget.take(request.num_tokens)
        answer: asyncio.Future[ForwardOutput] = asyncio.get_running_loop().create_future()
        admitted = Admitted(request, deadline, answer)
        self._waiting[admitted] = None
        answer.add_done_callback(lambda _: self._left(admitted))
        self._pump()
        return answer

    def _left(self, admitted: Admitted) -> None:
        self._budget.give_back(admitted.request.num_tokens)
        self._waiting.pop(admitted, None)

    def _pump(self) -> None:
        while self._waiting and len(self._in_flight) < _MAX_IN_FLIGHT and not self._should_wait():
            members = self._take()
            if members:
                self._launch(Batch(members))

    def _should_wait(self) -> bool:
        """While the hosts are busy, a batch that is not full may wait for more requests."""
        wait_s = self._config.max_batch_wait_ms / 1000
        if not wait_s or not self._in_flight:
            return False
        if sum(admitted.request.num_tokens for admitted in self._waiting) >= self._config.max_batch_tokens:
            return False
        loop = asyncio.get_running_loop()
        ready_at = next(iter(self._waiting)).admitted_at + wait_s
        if loop.time() >= ready_at:
            return False
        if self._timer is None or self._timer.cancelled() or self._timer.when() <= loop.time():
            self._timer = loop.call_at(ready_at, self._pump)
        return True

    def _take(self) -> list[Admitted]:
        """The oldest request and, in order, the requests that can join it; cancelled requests are left out."""
        members: list[Admitted] = []
        tokens = 0
        while self._waiting:
            head = next(iter(self._waiting))
            if not head.answer.done():
                full = tokens + head.request.num_tokens > self._config.max_batch_tokens
                if members and (full or head.join_key != members[0].join_key):
                    break
                members.append(head)
                tokens += head.request.num_tokens
            del self._waiting[head]
        return members

    def _launch(self, batch: Batch) -> None:
        task = asyncio.get_running_loop().create_task(self._guarded(batch))
        self._in_flight.add(task)

        def give_up(_: asyncio.Future[ForwardOutput]) -> None:
            if batch.is_abandoned:
                task.cancel()

        def finished(_: asyncio.Task[None]) -> None:
            self._in_flight.discard(task)
            self._pump()

        for member in batch.members:
            member.answer.add_done_callback(give_up)
        task.add_done_callback(finished)

    async def _guarded(self, batch: Batch) -> None:
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
        assert batch.is_abandoned, "a batch ended without an answer for every request"
