"""Both programs in one process: a controller, and a frontend that follows it as any other does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from moeserve.cluster.cluster import Cluster
from moeserve.config import ServiceConfig
from moeserve.control import Controller
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.observe.stats import HostInfo
from moeserve.programs.clusters import cluster_of
from moeserve.programs.controller import ControllerProgram
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.in_process_orders import InProcessOrders
from moeserve.server import Control, check_exposure, frontend_tokens

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Service:
    """One service in this process: `start` it, use `target`, `stop` it. `progress` is told, in words, how the start goes.

    `cluster`: what its hosts run on; None = what the configuration says.
    """

    def __init__(self, config: ServiceConfig, progress: Progress = log.info, cluster: Cluster | None = None) -> None:
        self._config = config
        self._progress = unfailing(progress)
        self._cluster = cluster
        self._program: ControllerProgram | None = None
        self._frontend: FrontendProgram | None = None
        self._orders: InProcessOrders | None = None
        self._tasks: list[asyncio.Task[None]] = []
        #: what keeps it from going on
        self.failure: MoEServeError | None = None
        self._broken = asyncio.Event()

    @property
    def program(self) -> ControllerProgram:
        """The half that controls."""
        assert self._program is not None, "a service that has started"
        return self._program

    @property
    def frontend(self) -> FrontendProgram:
        """The half that answers requests."""
        assert self._frontend is not None, "a service that has started"
        return self._frontend

    @property
    def orders(self) -> InProcessOrders:
        """How the frontend follows."""
        assert self._orders is not None, "a service that has started"
        return self._orders

    @property
    def controller(self) -> Controller:
        """Changes what is served."""
        return self.program.controller

    @property
    def hosts(self) -> list[HostInfo]:
        """What hosts said of themselves when they were started."""
        return self.program.hosts

    @property
    def target(self) -> str:
        """host:port of the gRPC service."""
        return self.frontend.target

    @property
    def metrics_target(self) -> str:
        """host:port of the metrics endpoint."""
        return self.frontend.metrics_target

    async def start(self) -> None:
        """Until every host is ready and health says SERVING. What was started is stopped again when something fails.

        Raises ConfigError (wrong settings, files, ports or resources) or what a host raised.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def over(self) -> None:
        """Until somebody who may has asked for its end. Raises ExpertUnavailable when it cannot go on: then it is to be stopped, too."""
        ends = [asyncio.create_task(event.wait()) for event in (self.controller.stop_requested, self._broken)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if self.failure is not None:
            raise self.failure

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), then stop everything."""
        if self._frontend is not None:
            await self._frontend.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._program is not None:
            await self._program.stop()

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        if self._frontend is not None:
            await self._frontend.hurry()

    async def _start(self) -> None:
        config = self._config
        check_exposure(config.server)
        tokens = frontend_tokens(config.controller)
        program = self._program = ControllerProgram(config, self._cluster or cluster_of(config), self._progress)
        await program.prepare(is_followed=bool(tokens))
        self._orders = InProcessOrders(program.frontends)
        frontend = self._frontend = FrontendProgram(
            config.server,
            self._orders,
            name="serve",
            node=program.cluster.here,
            admin=program.controller,
            control=Control(program.frontends, tokens) if tokens else None,
            layers=program.layers,
            progress=log.info,
        )
        # The ports come before the weights: whoever probes them is told that the service is starting.
        await frontend.open()
        await program.bring_up()
        await frontend.ready()
        await program.keep()
        for work in (self._end_when_lost(), self._end_when_broken(frontend), self._end_when_failed()):
            self._later(work)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, until the end."""
        self._tasks.append(asyncio.create_task(work))

    async def _end_when_lost(self) -> None:
        """Hosts that there are serve on, as long as they have all experts."""
        loss = await self.program.lost()
        if not loss.is_final:
            await self.frontend.ailing()
        self._fail(ExpertUnavailable(f"this service cannot go on, and must be started anew: {loss.why}"))

    async def _end_when_broken(self, frontend: FrontendProgram) -> None:
        self._fail(await frontend.broken)

    async def _end_when_failed(self) -> None:
        try:
            await self.program.failed()
        except Exception as error:
            log.exception("the controller cannot go on")
            self._fail(MoEServeError(f"the controller failed: {type(error).__name__}: {error}"))

    def _fail(self, error: MoEServeError) -> None:
        self.failure = error
        self._broken.set()


def unfailing(progress: Progress) -> Progress:
    """What is told to people decides nothing: not even when nobody can be told."""

    def tell(line: str) -> None:
        try:
            progress(line)
        except Exception as error:
            log.debug("could not tell %r: %s", line, error)

    return tell
