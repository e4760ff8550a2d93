"""Both programs in one process: a controller, and a frontend that follows it like any other."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from moeserve.addresses import port_of
from moeserve.cluster.cluster import Cluster
from moeserve.config import ServiceConfig
from moeserve.control.controller import Controller
from moeserve.control.counted import Elsewhere
from moeserve.errors import ExpertUnavailable, MoEServeError
from moeserve.loops import all_or_none
from moeserve.observe.page import OtherProcesses
from moeserve.observe.stats import HostInfo
from moeserve.programs.clusters import cluster_of
from moeserve.programs.controller import ControllerProgram
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.in_process_orders import InProcessOrders
from moeserve.programs.more_frontends import MoreFrontends, metrics_targets
from moeserve.programs.same_user import SameUserDoor
from moeserve.server.control import Control
from moeserve.server.ports import require_free_ports
from moeserve.server.security import check_exposure, frontend_tokens

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Service:
    """One service in this process: `start` it, use `target`, `stop` it. `progress` receives lines while it starts.

    `cluster`: where its hosts run; None = as the configuration says.
    """

    def __init__(self, config: ServiceConfig, progress: Progress = log.info, cluster: Cluster | None = None) -> None:
        self._config = config
        self._progress = unfailing(progress)
        self._cluster = cluster
        self._program: ControllerProgram | None = None
        self._frontend: FrontendProgram | None = None
        self._orders: InProcessOrders | None = None
        self._more: MoreFrontends | None = None
        self._door: SameUserDoor | None = None
        self._tasks: list[asyncio.Task[None]] = []
        #: why it cannot continue
        self.failure: MoEServeError | None = None
        self._broken = asyncio.Event()

    @property
    def program(self) -> ControllerProgram:
        """The controller."""
        assert self._program is not None, "a service that has started"
        return self._program

    @property
    def frontend(self) -> FrontendProgram:
        """The frontend."""
        assert self._frontend is not None, "a service that has started"
        return self._frontend

    @property
    def orders(self) -> InProcessOrders:
        """The stream between the two."""
        assert self._orders is not None, "a service that has started"
        return self._orders

    @property
    def controller(self) -> Controller:
        """Changes what is served."""
        return self.program.controller

    @property
    def hosts(self) -> list[HostInfo]:
        """Hosts as they described themselves when they started."""
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
        """Returns when every host is ready and health says SERVING. After a failure everything is stopped again.

        Raises ConfigError (wrong settings, files, ports or resources) or a host's error.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def over(self) -> None:
        """Returns when an administrator has asked for its end. Raises ExpertUnavailable when it cannot continue; stop it then, too."""
        ends = [asyncio.create_task(event.wait()) for event in (self.controller.stop_requested, self._broken)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if self.failure is not None:
            raise self.failure

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), then stop everything."""
        if self._program is not None:
            await self._program.abandon_changes()
        if self._door is not None:
            self._door.close()
        await asyncio.gather(*(one.stop() for one in (self._more, self._frontend) if one is not None))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._program is not None:
            await self._program.stop()

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        if self._frontend is not None:
            await self._frontend.hurry()
        if self._more is not None:
            self._more.hurry()

    async def _start(self) -> None:
        config = self._config
        check_exposure(config.server)
        await require_free_ports(config.server)
        own = secrets.token_urlsafe(32)
        tokens = frontend_tokens(config.controller, own)
        program = self._program = ControllerProgram(config, self._cluster or cluster_of(config), self._progress)
        shares_port = config.server.processes > 1
        await program.prepare(is_followed=tokens.file is not None or shares_port)
        self._orders = InProcessOrders(program.frontends)
        frontend = self._frontend = FrontendProgram(
            config.server,
            self._orders,
            name="serve",
            node=program.cluster.here,
            admin=program.controller,
            control=Control(program.frontends, replace(tokens, is_private=tokens.file is None)),
            layers=program.layers,
            others=OtherProcesses(partial(metrics_targets, program.frontends, config.server.processes)) if shares_port else None,
            progress=log.info,
        )
        # The ports come before the weights: probes learn that the service is starting.
        await frontend.open()
        program.frontends.on_counted = Elsewhere(frontend.metrics, program.frontends.keys).take
        port = port_of(frontend.target)
        self._door = SameUserDoor(own, program.cluster.here)
        await self._door.open(port)
        starting = [program.bring_up(), frontend.ready()]
        if shares_port:
            self._more = MoreFrontends(config, program, port, own)
            self._progress(f"starting {config.server.processes - 1} more processes on the port of {frontend.target}")
            starting.append(self._more.start())
        await program.unless_over(all_or_none(starting))
        await program.keep()
        for work in (self._end_when_lost(), self._end_when_broken(frontend), self._end_when_failed()):
            self._later(work)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, until `stop`."""
        self._tasks.append(asyncio.create_task(work))

    async def _end_when_lost(self) -> None:
        """Running hosts keep serving as long as every expert can be reached."""
        loss = await self.program.lost()
        if not loss.is_final:
            await self.frontend.ailing()
        self._fail(ExpertUnavailable(f"this service cannot continue and must be restarted: {loss.why}"))

    async def _end_when_broken(self, frontend: FrontendProgram) -> None:
        self._fail(await frontend.broken)

    async def _end_when_failed(self) -> None:
        try:
            await self.program.failed()
        except Exception as error:
            log.exception("the controller failed")
            self._fail(MoEServeError(f"the controller failed: {type(error).__name__}: {error}"))

    def _fail(self, error: MoEServeError) -> None:
        self.failure = error
        self._broken.set()


def unfailing(progress: Progress) -> Progress:
    """`progress`, but its failures change nothing."""

    def tell(line: str) -> None:
        try:
            progress(line)
        except Exception as error:
            log.debug("could not report %r: %s", line, error)

    return tell
