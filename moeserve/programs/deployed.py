"""The controller of a deployed service, as its actor runs it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from moeserve.addresses import called, join
from moeserve.cluster.ray_cluster import DetachedRayCluster
from moeserve.cluster.ray_program import end_this_process
from moeserve.config import ServedModel, ServiceConfig
from moeserve.programs.controller import ControllerProgram
from moeserve.programs.frontend_actors import FrontendActors
from moeserve.programs.same_user import SameUserDoor
from moeserve.programs.timing import CONTROLLER_DRAIN_S
from moeserve.server.control import Control
from moeserve.server.grpc_server import GrpcServer
from moeserve.server.security import controller_address, frontend_tokens

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Deployed:
    """host:port of the controller and of its frontends; the configuration as JSON; is_ending = it is shutting down."""

    controller: str
    frontends: Sequence[str]
    config_json: str
    is_ending: bool


class DeployedController:
    """A `ControllerProgram` with a port of its own, and the frontends that it starts. A later incarnation adopts hosts and frontends."""

    def __init__(self, config: ServiceConfig, tell: Tell) -> None:
        self._config = config
        self._tell = tell
        cluster = DetachedRayCluster(config.only(ServedModel), config.placement, config.ray)
        self._program = ControllerProgram(config, cluster, tell)
        self._server: GrpcServer | None = None
        self._actors: FrontendActors | None = None
        self._door: SameUserDoor | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._target = ""
        self._is_ending = False

    async def start(self) -> None:
        """Returns when hosts and frontends are ready. If something fails, a first incarnation stops what it has started."""
        is_first = self._program.cluster.store.load() is None
        try:
            await self._start(is_first)
        except BaseException:
            if is_first:
                await self.stop()
            raise

    async def stop(self) -> None:
        """Drain frontends and end hosts; only this process is left."""
        await self._program.abandon_changes()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._actors is not None:
            await self._actors.stop()
        if self._door is not None:
            self._door.close()
        if self._server is not None:
            await self._server.drain(CONTROLLER_DRAIN_S)
        await self._program.stop()

    def describe(self) -> Deployed:
        """For the process that deploys the service."""
        frontends = [] if self._actors is None else self._actors.targets
        return Deployed(self._target, frontends, self._config.model_dump_json(), self._is_ending)

    async def _start(self, is_first: bool) -> None:
        program = self._program
        await program.prepare(is_followed=True)
        actors = self._actors = await self._listen()
        await program.bring_up()
        if is_first:
            await program.unless_over(actors.start())
        await program.keep()
        for work in (actors.keep(), program.failed(), self._end_when_asked()):
            self._later(work)

    async def _listen(self) -> FrontendActors:
        """Listen before weights are loaded, so status is available meanwhile. Returns what starts frontends that follow this controller."""
        program, where = self._program, self._config.controller
        control = Control(program.frontends, frontend_tokens(where, program.saved.frontend_token))
        address = controller_address(self._config.server, where)
        if program.saved.control_port:  # where frontends look for it
            address = address.model_copy(update={"port": program.saved.control_port})
        self._server = GrpcServer(address, _ignore, admin=program.controller, control=control)
        port = await self._server.start()
        program.remember(control_port=port)
        self._door = SameUserDoor(program.saved.frontend_token, program.cluster.here)
        await self._door.open(port)
        self._target = join(called(where.control_host), port)
        return FrontendActors(self._config, port, program.saved.frontend_token, self._tell)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, until `stop`."""
        self._tasks.add(asyncio.create_task(_or_restart(work)))

    async def _end_when_asked(self) -> None:
        await self._program.controller.stop_requested.wait()
        self._is_ending = True
        self._tasks = {task for task in self._tasks if task is not asyncio.current_task()}
        await self.stop()
        end_this_process()


async def _or_restart(work: Coroutine[Any, Any, None]) -> None:
    """A failure ends this process; Ray starts the next incarnation."""
    try:
        await work
    except Exception:
        log.exception("the controller failed; Ray restarts it")
        os._exit(1)


def _ignore(_method: str, _code: str, _seconds: float) -> None:
    """Calls of administrators are not counted."""
