"""A frontend as a program of its own, one of any number: follows a controller, serves gRPC and metrics; needs no Ray."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from moeserve.addresses import called, join, parse_target
from moeserve.client import TLS, ControlClient
from moeserve.client.control import FollowStream
from moeserve.config import ServerConfig
from moeserve.control import CannotFollow, Follower
from moeserve.control.follow import Order, Report
from moeserve.errors import ConfigError, DeadlineExceeded, MoEServeError, PermissionDenied, ServiceUnreachable, Unauthenticated
from moeserve.frontend import Frontend
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import StatusPage
from moeserve.server import GrpcServer

log = logging.getLogger(__name__)

_FIRST_ORDER_S: Final = 15.0
_LEAST_PAUSE_S: Final = 0.2
_MOST_PAUSE_S: Final = 5.0
_GOODBYE_S: Final = 2.0


class FrontendService:
    """`start` it, use `target`, `stop` it. When `broken` is done, it cannot go on: stop it, and tell why.

    Listens as `server` says; what it serves, and how, is told by `controller` ("host:port"), to which `token` admits it, or what that says
    whenever it connects. `node` is the Ray node this process is on, if it is on one: hosts there are reached through memory.
    """

    def __init__(
        self,
        controller: str,
        token: str | Callable[[], str],
        server: ServerConfig,
        *,
        tls: TLS | None = None,
        name: str = "",
        node: str = "",
        progress: Callable[[str], None] = log.info,
    ) -> None:
        self._server, self._progress = server, progress
        self._controller, self._host = controller, called(server.host, parse_target(controller, "controller"))
        self._follower = Follower(server, Report(name or f"{socket.gethostname()}-{os.getpid()}", node=node), self)
        self._grpc = GrpcServer(server, self._observe, is_starting=True)
        self._following = _Following(ControlClient(controller, token, tls), self._follower)
        self._metrics: Metrics | None = None
        self._page: StatusPage | None = None
        self._healthy: list[bool] = []
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.broken: asyncio.Future[MoEServeError] = asyncio.get_running_loop().create_future()
        #: host:port of the gRPC service, and of the metrics endpoint
        self.target = ""
        self.metrics_target = ""

    async def start(self, timeout_s: float = 60.0) -> None:
        """Until every expert can be reached; until then health says NOT_SERVING.

        Raises ServiceUnreachable when the controller was not reached within `timeout_s`, Unauthenticated or PermissionDenied when it does
        not let this frontend follow, ConfigError when what it serves cannot be served here.
        """
        try:
            self.target = join(self._host, await self._grpc.start())
            self._follower.say(target=self.target)
            self._progress(f"following {self._controller}")
            work = (self._following.run(timeout_s), self._follower.run())
            self._tasks = [asyncio.create_task(self._guarded(one)) for one in work]
            ready = asyncio.create_task(self._ready.wait())
            ends: set[asyncio.Future[Any]] = {ready, self.broken}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            if self.broken.done() and not self._ready.is_set():
                raise self.broken.result()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), leave the controller, then stop everything."""
        self._healthy.clear()
        self._follower.say(is_ready=False)
        await self._grpc.drain(self._server.drain_timeout_s)
        self._following.leave()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=_GOODBYE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._follower.close()
        if self._page is not None:
            await asyncio.to_thread(self._page.stop)

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        await self._grpc.stop()

    def enter(self, frontend: Frontend, metrics: Metrics) -> None:
        """What is served is known."""
        host, port = self._server.host, self._server.metrics_port
        try:
            self._page = StatusPage(host, port, metrics.registry, frontend.stats)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: {join(host, port)} cannot be listened on: {error.strerror}") from None
        self.metrics_target = join(self._host, self._page.port)
        self._follower.say(metrics_target=self.metrics_target)
        self._metrics, self._healthy = metrics, [False] * len(frontend.layers)
        self._grpc.serve(frontend)
        self._progress(f"serving {len(frontend.layers)} layers of {frontend.model}")

    def health_changed(self, layer: int, healthy: bool) -> None:
        """As `Frontend` tells it."""
        self._grpc.set_serving(layer, healthy)
        if not self._healthy:
            return  # it is stopping
        self._healthy[layer] = healthy
        self._follower.say(is_ready=all(self._healthy))
        if all(self._healthy):
            self._ready.set()

    def _observe(self, method: str, code: str, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.observe_call(method, code, seconds)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except MoEServeError as error:
            if not self.broken.done():
                self.broken.set_result(error)
        except Exception as error:
            log.exception("this frontend cannot go on")
            if not self.broken.done():
                self.broken.set_result(MoEServeError(f"this frontend failed: {type(error).__name__}: {error}"))


class _Following:
    """The stream of a follower to its controller, begun again whenever it breaks; what was heard stays in force meanwhile."""

    def __init__(self, client: ControlClient, follower: Follower) -> None:
        self._client, self._follower = client, follower
        self._leaving = asyncio.Event()
        self._is_heard = False

    def leave(self) -> None:
        """Have the stream end, and the controller know that this is for good."""
        self._leaving.set()
        self._follower.reported.notify()

    async def run(self, timeout_s: float) -> None:
        """Until `leave`. Raises what `FrontendService.start` says of the controller, and CannotFollow."""
        deadline, was_heard, pause_s = time.monotonic() + timeout_s, False, _LEAST_PAUSE_S
        while not self._leaving.is_set():
            self._is_heard = False
            try:
                await self._follow()
            except CannotFollow:
                raise
            except MoEServeError as error:
                if not (was_heard or self._is_heard):
                    _require_patience(error, deadline)
                elif self._is_heard and not self._leaving.is_set():
                    log.warning("the controller is gone, and what it said last stays in force: %s", error)
            was_heard = was_heard or self._is_heard
            pause_s = _LEAST_PAUSE_S if self._is_heard else min(2 * pause_s, _MOST_PAUSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), pause_s * random.uniform(0.5, 1))  # noqa: S311

    async def _follow(self) -> None:
        self._follower.begin()
        async with self._client.follow() as stream:
            telling = asyncio.create_task(self._tell(stream))
            try:
                await self._hear(stream, _FIRST_ORDER_S)
                self._is_heard = True
                log.info("the controller is followed")
                while True:
                    await self._hear(stream, None)
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)

    async def _hear(self, stream: FollowStream, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                order = await stream.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the controller said nothing within {timeout_s:g} s") from None
        self._follower.hear(Order.from_message(order))

    async def _tell(self, stream: FollowStream) -> None:
        said: Report | None = None
        while not self._leaving.is_set():
            if said is self._follower.report:
                await self._follower.reported.wait()
            else:
                said = self._follower.report
                await stream.write(said.to_message())
        await stream.write(replace(self._follower.report, is_leaving=True).to_message())


def _require_patience(error: MoEServeError, deadline: float) -> None:
    """Raises `error` where waiting does not help, and ServiceUnreachable after the deadline."""
    if isinstance(error, Unauthenticated | PermissionDenied):
        raise error
    if time.monotonic() > deadline:
        raise ServiceUnreachable(f"no controller to follow was reached: {error}")
