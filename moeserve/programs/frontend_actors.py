"""The frontends that a controller starts, as actors beside it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from moeserve.addresses import is_loopback, join
from moeserve.cluster.ray_program import ProgramActor, start_program
from moeserve.cluster.ray_where import node_address, on_this_node, spread
from moeserve.config import ServiceConfig
from moeserve.errors import MoEServeError
from moeserve.programs.frontend_actor import DeployedFrontend
from moeserve.programs.timing import FRONTENDS_LOOK_S

log = logging.getLogger(__name__)


class FrontendActors:
    """As many as controller.frontends, found again or started, and replaced when Ray has given them up."""

    def __init__(self, config: ServiceConfig, control_port: int, token: str, tell: Callable[[str], None]) -> None:
        self._config = config
        self._token = token
        self._tell = tell
        self._names = [f"frontend-{number}" for number in range(config.controller.frontends)]
        self._targets: dict[str, str] = {}
        host = config.controller.control_host
        # Others cannot call a loopback address of this node.
        self._where: dict[str, Any] = on_this_node() if is_loopback(host) else spread()
        self._controller = join(host if is_loopback(host) else node_address(), control_port)

    @property
    def targets(self) -> list[str]:
        """host:port of each that is ready, in their order."""
        return [self._targets[name] for name in self._names if name in self._targets]

    async def start(self) -> None:
        """Returns when all are ready. Raises the error of one that cannot start."""
        await asyncio.gather(*map(self._have, self._names))

    async def keep(self) -> None:
        """Replace frontends that are gone for good, or cannot start, until cancelled."""
        await asyncio.gather(*map(self._keep, self._names))

    async def _keep(self, name: str) -> None:
        while True:
            try:
                await self._have(name)
            except MoEServeError as error:
                log.warning("replacing %s: %s", name, error)
                self._drop(name)
            await asyncio.sleep(FRONTENDS_LOOK_S)

    def _drop(self, name: str) -> None:
        self._targets.pop(name, None)
        actor = ProgramActor.find(name, self._config.ray.namespace)
        if actor is not None:
            actor.kill()

    async def stop(self) -> None:
        """Drain and end all of them."""
        found = [ProgramActor.find(name, self._config.ray.namespace) for name in self._names]
        timeout_s = self._config.server.drain_timeout_s + FRONTENDS_LOOK_S
        await asyncio.gather(*(actor.stop(timeout_s) for actor in found if actor is not None))

    async def _have(self, name: str) -> None:
        namespace = self._config.ray.namespace
        actor = ProgramActor.find(name, namespace)
        if actor is None:
            self._tell(f"starting {name}")
            make = partial(DeployedFrontend, self._config, name, self._controller, self._token)
            actor = start_program("frontend", name, namespace, make, self._where)
        self._targets[name] = await actor.ready()
