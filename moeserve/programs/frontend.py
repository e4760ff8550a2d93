"""A frontend as a program: follows a controller, serves gRPC and metrics; needs no Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from moeserve.addresses import called, join
from moeserve.checkpoints import ServedLayers
from moeserve.config import ServerConfig
from moeserve.control import Follower, Following, Orders, timing
from moeserve.control.follow import Report
from moeserve.errors import ConfigError, MoEServeError
from moeserve.frontend import Frontend
from moeserve.loops import Notifier
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import StatusPage
from moeserve.server import GrpcServer
from moeserve.server.admin import Admin
from moeserve.server.control import Control

log = logging.getLogger(__name__)


class FrontendProgram:
    """`start` it, use `target`, `stop` it. When `broken` is done, it cannot continue: stop it.

    `server` says where it listens; `orders` say what it serves, and how. `node` is the Ray node of this process, if any: hosts
    there are reached through memory. `admin` and `control` belong to a controller in this process and are served on the same port; `layers`
    are the ones it has read.
    """

    def __init__(
        self,
        server: ServerConfig,
        orders: Orders,
        *,
        name: str = "",
        node: str = "",
        admin: Admin | None = None,
        control: Control | None = None,
        layers: ServedLayers | None = None,
        progress: Callable[[str], None] = log.info,
    ) -> None:
        self._server, self._progress = server, progress
        self._controller, self._host = orders.controller, called(server.host, orders.controller)
        self._follower = Follower(server, Report(name or f"{socket.gethostname()}-{os.getpid()}", node=node), self, layers)
        self._grpc = GrpcServer(server, self._observe, is_starting=True, admin=admin, control=control)
        self._following = Following(orders, self._follower)
        self._frontend: Frontend | None = None
        self._metrics: Metrics | None = None
        self._page: StatusPage | None = None
        self._healthy: list[bool] = []
        self._known, self._ready = asyncio.Event(), asyncio.Event()
        self._health = Notifier()
        self._tasks: list[asyncio.Task[None]] = []
        self.broken: asyncio.Future[MoEServeError] = asyncio.get_running_loop().create_future()
        #: host:port of the gRPC service, and of the metrics endpoint
        self.target = ""
        self.metrics_target = ""

    @property
    def frontend(self) -> Frontend:
        """The engine that answers requests, once it is known what to serve."""
        assert self._frontend is not None, "a frontend that has been opened"
        return self._frontend

    @property
    def public_key(self) -> str:
        """Its key for hosts on other nodes, Z85; "" until a controller has given it keys."""
        return self._follower.report.public_key

    @property
    def metrics(self) -> Metrics:
        """The metrics of this frontend, once it is known what to serve."""
        assert self._metrics is not None, "a frontend that has been opened"
        return self._metrics

    async def start(self, timeout_s: float = 60.0) -> None:
        """`open`, and wait until it is `ready`; after a failure everything is stopped again. Raises what these raise."""
        try:
            await self.open(timeout_s)
            await self.ready()
        except BaseException:
            await self.stop()
            raise

    async def open(self, timeout_s: float = 60.0) -> None:
        """Listen, and wait until it is known what to serve. Health says NOT_SERVING, and requests wait for the hosts.

        Raises ServiceUnreachable when the controller was not reached within `timeout_s`, Unauthenticated or PermissionDenied when it
        refuses this frontend, ConfigError when this frontend cannot serve what it says.
        """
        self.target = join(self._host, await self._grpc.start())
        self._follower.say(target=self.target)
        if self._controller is not None:
            self._progress(f"following {self._controller.text}")
        work = (self._following.run(timeout_s), self._follower.run())
        self._tasks = [asyncio.create_task(self._guarded(one)) for one in work]
        await self._until(self._known)

    async def ready(self) -> None:
        """Returns when every expert can be reached. Raises ConfigError when this frontend cannot serve what the controller says."""
        await self._until(self._ready)

    async def ailing(self) -> None:
        """Returns when some expert cannot be reached."""
        await self._health.until(lambda: not all(self._healthy))

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), leave the controller, then stop everything."""
        self._healthy.clear()
        self._follower.say(is_ready=False)
        await self._grpc.drain(self._server.drain_timeout_s)
        self._following.leave()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=timing.GOODBYE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._follower.close()
        if self._page is not None:
            await asyncio.to_thread(self._page.stop)

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        await self._grpc.stop()

    def enter(self, frontend: Frontend, metrics: Metrics, otlp_endpoint: str | None) -> None:
        """The follower calls it when it is known what to serve."""
        host, port = self._server.host, self._server.metrics_port
        if otlp_endpoint is not None:
            self._grpc.record_spans(otlp_endpoint)
        try:
            self._page = StatusPage(host, port, metrics.registry, frontend.stats)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: {join(host, port)} cannot listen: {error.strerror}") from None
        self.metrics_target = join(self._host, self._page.port)
        self._follower.say(metrics_target=self.metrics_target)
        self._frontend, self._metrics, self._healthy = frontend, metrics, [False] * len(frontend.layers)
        metrics.queue_bytes.set_function(lambda: self._grpc.queue_bytes)
        self._grpc.serve(frontend)
        self._progress(f"serving {len(frontend.layers)} layers of {frontend.model}")
        self._known.set()

    def health_changed(self, layer: int, healthy: bool) -> None:
        """As `Frontend` tells it."""
        self._grpc.set_serving(layer, healthy)
        if not self._healthy:
            return  # it is stopping
        self._healthy[layer] = healthy
        self._follower.say(is_ready=all(self._healthy))
        self._health.notify()
        if all(self._healthy):
            self._ready.set()

    def _observe(self, method: str, code: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.observe_call(method, code, seconds)

    async def _until(self, event: asyncio.Event) -> None:
        """Waits for `work`; raises the error that breaks this frontend meanwhile."""
        happening = asyncio.create_task(event.wait())
        ends: set[asyncio.Future[Any]] = {happening, self.broken}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
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
