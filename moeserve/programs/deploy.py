"""Starting a service on a Ray cluster, where it keeps running."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from moeserve.cluster.ray_program import ProgramActor, start_program
from moeserve.cluster.ray_runtime import RayRuntime
from moeserve.cluster.ray_sweep import sweep
from moeserve.cluster.ray_where import on_head
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError, MoEServeError
from moeserve.programs.deployed import Deployed, DeployedController, Tell
from moeserve.programs.timing import GONE_LOOK_S, STOP_TIMEOUT_S
from moeserve.server.security import controller_address

log = logging.getLogger(__name__)

_CONTROLLER = "controller"


class Deployer:
    """A connection to the cluster at ray.address; `close` disconnects and leaves the service running."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises ConfigError for a configuration that cannot be deployed."""
        if config.cluster.kind != "ray":
            raise ConfigError(f"cluster.kind is {config.cluster.kind!r}; allowed with deploy: 'ray'")
        if config.server.processes != 1:
            raise ConfigError(f"server.processes is {config.server.processes}; allowed with deploy: 1 (see controller.frontends)")
        if config.ray.address is None:
            raise ConfigError("ray.address is not set; deploy needs a running Ray cluster, for example --address auto")
        if config.server.admin_token_file is None:
            raise ConfigError("server.admin_token_file is not set; status and shutdown of a deployed service need its token")
        controller_address(config.server, config.controller)
        self._config = config
        self._runtime = RayRuntime(config.ray, config.placement)

    def join(self) -> None:
        """Raises ConfigError when the cluster does not answer."""
        self._runtime.start()

    def close(self) -> None:
        """Idempotent."""
        self._runtime.stop()

    async def until_gone(self) -> None:
        """Returns when no service is deployed in this namespace any more."""
        there = True
        while there:
            await asyncio.sleep(GONE_LOOK_S)
            there = await asyncio.to_thread(self._find) is not None

    async def deploy(self, tell: Tell) -> Deployed:
        """Deploy, or find the same service deployed already, and wait until it is ready; `tell` receives lines of progress.

        Raises ConfigError when it cannot be deployed, or another service is; then nothing has changed.
        """
        deployed = await self._there(tell) or await self._new(tell)
        if deployed.is_ending:
            tell(f"the service at {deployed.controller} is shutting down; waiting until it has ended")
            await self.until_gone()
            deployed = await self._new(tell)
        if deployed.config_json != self._config.model_dump_json():
            raise ConfigError(
                f"another service, or this one with another configuration, is deployed in ray.namespace {self._config.ray.namespace!r}: "
                f"shut it down first (moeserve shutdown {deployed.controller}) or choose another namespace"
            )
        return deployed

    async def _there(self, tell: Tell) -> Deployed | None:
        """The service that is deployed, once it is ready; None = there is none, or one that could not start, which is removed."""
        there = self._find()
        if there is None:
            return None
        tell(f"a controller is in namespace {self._config.ray.namespace} already; waiting until it is ready")
        try:
            deployed: Deployed = await there.ready()
        except MoEServeError as error:  # whoever waited for its start has gone, or it has ended since
            tell(f"it could not start, and is removed: {error}")
            there.kill()
            await self.until_gone()
            return None
        return deployed

    def _find(self) -> ProgramActor | None:
        return ProgramActor.find(_CONTROLLER, self._config.ray.namespace)

    async def _new(self, tell: Tell) -> Deployed:
        await sweep(self._config.ray.namespace)
        tell(f"starting a controller in namespace {self._config.ray.namespace}")
        make = partial(DeployedController, self._config)
        controller = start_program("controller", _CONTROLLER, self._config.ray.namespace, make, on_head())
        try:
            deployed: Deployed = await controller.ready(tell)
        except BaseException:
            await controller.stop(STOP_TIMEOUT_S)
            raise
        return deployed
