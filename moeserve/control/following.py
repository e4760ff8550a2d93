"""Following a controller: a broken stream is opened again, and the last order stays in force meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from dataclasses import replace

from moeserve.control import timing
from moeserve.control.follow import Report
from moeserve.control.follower import CannotFollow, Follower
from moeserve.control.orders import Orders, OrderStream
from moeserve.errors import DeadlineExceeded, MoEServeError, PermissionDenied, ServiceUnreachable, Unauthenticated

log = logging.getLogger(__name__)


class Following:
    """Passes orders from `orders` to `follower`, and its reports to the controller."""

    def __init__(self, orders: Orders, follower: Follower) -> None:
        self._orders, self._follower = orders, follower
        self._leaving = asyncio.Event()
        self._is_heard = False
        #: why the latest attempt has failed; None = none has since it was heard
        self.failure: MoEServeError | None = None

    def leave(self) -> None:
        """Ends the stream, and tells the controller that the frontend leaves for good."""
        self._leaving.set()
        self._follower.reported.notify()

    async def run(self, timeout_s: float) -> None:
        """Follows until `leave`.

        Raises ServiceUnreachable when no controller was reached within `timeout_s`, Unauthenticated or PermissionDenied when the first one
        refuses this frontend, and CannotFollow.
        """
        deadline, was_heard, pause_s = time.monotonic() + timeout_s, False, timing.LEAST_PAUSE_S
        while not self._leaving.is_set():
            self._is_heard = False
            try:
                await self._follow()
            except CannotFollow:
                raise
            except MoEServeError as error:
                self.failure = error.with_traceback(None)
                if not (was_heard or self._is_heard):
                    _require_patience(error, deadline)
                elif self._is_heard and not self._leaving.is_set():
                    log.warning("the controller cannot be reached; its last order stays in force: %s", error)
            was_heard = was_heard or self._is_heard
            pause_s = timing.LEAST_PAUSE_S if self._is_heard else min(2 * pause_s, timing.MOST_PAUSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), pause_s * random.uniform(0.5, 1))  # noqa: S311

    async def _follow(self) -> None:
        self._follower.begin()
        async with self._orders.follow() as stream:
            telling = asyncio.create_task(self._tell(stream))
            try:
                await self._hear(stream, timing.FIRST_ORDER_S)
                self._is_heard, self.failure = True, None
                log.info("following the controller")
                while True:
                    await self._hear(stream, None)
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)

    async def _hear(self, stream: OrderStream, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                order = await stream.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the controller sent no order within {timeout_s:g} s") from None
        self._follower.hear(order)

    async def _tell(self, stream: OrderStream) -> None:
        said: Report | None = None
        while not self._leaving.is_set():
            if said is self._follower.report:
                await self._follower.reported.wait()
            else:
                said = self._follower.report
                await stream.write(said)
        await stream.write(replace(self._follower.report, is_leaving=True))


def _require_patience(error: MoEServeError, deadline: float) -> None:
    """Raises `error` if waiting cannot help, and ServiceUnreachable after the deadline."""
    if isinstance(error, Unauthenticated | PermissionDenied):
        raise error
    if time.monotonic() > deadline:
        raise unreached(error)


def unreached(error: MoEServeError) -> ServiceUnreachable:
    """What to say after the last attempt, which has failed with `error`."""
    return ServiceUnreachable(f"no controller was reached: {error}")
