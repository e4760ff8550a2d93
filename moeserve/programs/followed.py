"""A frontend that follows a controller, however its callers reach it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from moeserve.checkpoints import ServedLayers
from moeserve.config import ServerConfig
from moeserve.control import timing
from moeserve.control.follow import Report
from moeserve.control.follower import Follower, Stage
from moeserve.control.following import Following
from moeserve.control.orders import Orders
from moeserve.errors import MoEServeError
from moeserve.frontend import Frontend
from moeserve.loops import Notifier
from moeserve.observe.metrics import Metrics

log = logging.getLogger(__name__)


class Followed:
    """`open` it, wait until it is `ready`, `close` it. When `broken` is done, it cannot continue.

    `stage` receives the engine once it is known what to serve, and its health; `layers` are those of the configuration, if they were read.
    """

    def __init__(self, server: ServerConfig, orders: Orders, report: Report, stage: Stage, layers: ServedLayers | None = None) -> None:
        self._stage = stage
        self.follower = Follower(server, report, self, layers)
        self._following = Following(orders, self.follower)
        self._frontend: Frontend | None = None
        self._metrics: Metrics | None = None
        self._healthy: list[bool] = []
        self._known, self._ready = asyncio.Event(), asyncio.Event()
        self._health = Notifier()
        self._tasks: list[asyncio.Task[None]] = []
        self.broken: asyncio.Future[MoEServeError] = asyncio.get_running_loop().create_future()

    @property
    def frontend(self) -> Frontend:
        """The engine that answers requests, once it is known what to serve."""
        assert self._frontend is not None, "a frontend that has been opened"
        return self._frontend

    @property
    def metrics(self) -> Metrics | None:
        """The metrics of this frontend; None until it is known what to serve."""
        return self._metrics

    @property
    def failure(self) -> MoEServeError | None:
        """Why the controller could not be reached lately; None = it could, or it is not known yet."""
        return self._following.failure

    @property
    def is_healthy(self) -> bool:
        """Whether every expert can be reached."""
        return bool(self._healthy) and all(self._healthy)

    async def open(self, timeout_s: float) -> None:
        """Follow, and wait until it is known what to serve.

        Raises ServiceUnreachable when the controller was not reached within `timeout_s`, Unauthenticated or PermissionDenied when it
        refuses this frontend, ConfigError when this frontend cannot serve what it says.
        """
        work = (self._following.run(timeout_s), self.follower.run())
        self._tasks = [asyncio.create_task(self._guarded(one)) for one in work]
        await self._until(self._known)

    async def ready(self) -> None:
        """Returns when every expert can be reached. Raises ConfigError when this frontend cannot serve what the controller says."""
        await self._until(self._ready)

    async def ailing(self) -> None:
        """Returns when some expert cannot be reached."""
        await self._health.until(lambda: not all(self._healthy))

    def decline(self) -> None:
        """The first step of an end: it says that it is not ready any more."""
        self._healthy.clear()
        self.follower.say(is_ready=False)

    async def close(self) -> None:
        """Leave the controller, and disconnect from the hosts."""
        if self._metrics is not None:
            self.follower.tell_of_demand(self._metrics)
        self._following.leave()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=timing.GOODBYE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.follower.close()

    def enter(self, frontend: Frontend, metrics: Metrics, otlp_endpoint: str | None) -> None:
        """As `Stage.enter`."""
        self._frontend, self._metrics, self._healthy = frontend, metrics, [False] * len(frontend.layers)
        self._stage.enter(frontend, metrics, otlp_endpoint)
        self._known.set()

    def health_changed(self, layer: int, healthy: bool) -> None:
        """As `Stage.health_changed`."""
        self._stage.health_changed(layer, healthy)
        if not self._healthy:
            return  # it is stopping
        self._healthy[layer] = healthy
        self.follower.say(is_ready=all(self._healthy))
        self._health.notify()
        if all(self._healthy):
            self._ready.set()

    async def _until(self, event: asyncio.Event) -> None:
        """Waits for `event`; raises the error that breaks this frontend meanwhile."""
        happening = asyncio.create_task(event.wait())
        ends: set[asyncio.Future[Any]] = {happening, self.broken}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            happening.cancel()
        if self.broken.done() and not event.is_set():
            raise self.broken.result()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except MoEServeError as error:
            if not self.broken.done():
                self.broken.set_result(error)
        except Exception as error:
            log.exception("this frontend failed")
            if not self.broken.done():
                self.broken.set_result(MoEServeError(f"this frontend failed: {type(error).__name__}: {error}"))
