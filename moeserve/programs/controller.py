"""What the controller's process does, from its start to its end."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from moeserve.addresses import called, join
from moeserve.checkpoints import ServedLayers
from moeserve.cluster import Fleet, RayNodes, Store, end_this_process
from moeserve.config import ServedModel, ServiceConfig
from moeserve.control import Controller, Frontends, Planner, Saved, State, first_state
from moeserve.errors import CheckpointChanged, ConfigError
from moeserve.observe.stats import HostInfo
from moeserve.programs.frontend_actors import FrontendActors
from moeserve.release import Release
from moeserve.server import Control, GrpcServer, controller_address, frontend_tokens

log = logging.getLogger(__name__)

#: for frontends that followed an earlier incarnation: they come back within seconds, or have gone
_REUNION_S: Final = 10.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Deployed:
    """host:port of the controller and of the frontends that it has started; the configuration as JSON; is_ending = it is shut down."""

    controller: str
    frontends: Sequence[str]
    config_json: str
    is_ending: bool


class ControllerProgram:
    """All of a deployed service that is not a host or a frontend. A later incarnation finds the hosts and frontends that are there."""

    def __init__(self, config: ServiceConfig, tell: Tell) -> None:
        self._config = config
        self._tell = tell
        self._store = Store(config.ray.namespace)
        self._running = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._target = ""
        self._is_ending = False

    async def start(self) -> None:
        """Until hosts and frontends are ready. When something fails, a first incarnation stops what it has started."""
        data = self._store.load()
        try:
            await self._start(None if data is None else Saved.from_bytes(data))
        except BaseException:
            if data is None:
                await self.stop()
            raise

    async def stop(self) -> None:
        """Frontends drain, hosts leave, and nothing of the service remains but this process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._running.aclose()
        self._store.clear()

    def describe(self) -> Deployed:
        """What whoever deploys it is told."""
        return Deployed(self._target, self._frontend_actors.targets, self._config.model_dump_json(), self._is_ending)

    async def _start(self, saved: Saved | None) -> None:
        config, layers = self._config, await asyncio.to_thread(ServedLayers.read, self._config.only(ServedModel))
        self._fleet = Fleet(layers.model, config.placement, config.ray, detached=True)
        nodes, planner = RayNodes(self._fleet), Planner(layers, config.placement, on_this_machine=config.ray.address is None)
        self._saved = saved or await self._first(planner, nodes)
        state = self._saved.state
        if saved is not None:
            await asyncio.to_thread(_say_what_changed, state.release, layers)
        self._fleet.start(self._saved.service_id)
        self._running.push_async_callback(self._fleet.stop)
        frontends = Frontends(self._saved.service_id, config, config.server.drain_timeout_s, self._admit, self._saved.frontend_keys)
        frontends.begin(state.release)
        controller = Controller(planner, state, nodes, self._fleet, frontends, self._remember, config.server.drain_timeout_s)
        self._running.push_async_callback(controller.end)
        await self._serve(controller, frontends)
        await self._fleet.admit(self._saved.frontend_keys)
        if saved is None:
            self._tell(f"loading the experts of {len(layers.sources)} layers on {len(state.assignments)} hosts")
            await controller.begin(self._fleet.take(state.release, state.assignments, self._host_ready))
        else:
            await controller.begin(self._fleet.adopt(state.release, state.assignments))
        self._later(self._fleet.watch(frontends.directory))
        if saved is None:
            await self._frontend_actors.start()
        else:
            await frontends.until_back(_REUNION_S)
        self._later(self._frontend_actors.keep())
        self._later(controller.keep())
        self._later(self._end_when_asked(controller))

    def _host_ready(self, info: HostInfo) -> None:
        self._tell(f"{info.name} ready on {info.device} of node {info.node[:12]}: {info.weights_bytes / 2**20:.1f} MiB, pid {info.pid}")

    async def _first(self, planner: Planner, nodes: RayNodes) -> Saved:
        state = await first_state(planner, nodes)
        saved = Saved(secrets.token_hex(6), secrets.token_hex(32), state)
        self._store.save(saved.to_bytes())
        return saved

    async def _serve(self, controller: Controller, frontends: Frontends) -> None:
        """Listen before the weights are there: who asks for a status meanwhile gets one."""
        where, token = self._config.controller, self._saved.frontend_token
        control = Control(frontends, frontend_tokens(where, token))
        address = controller_address(self._config.server, where)
        if self._saved.control_port:  # where frontends look for it
            address = address.model_copy(update={"port": self._saved.control_port})
        server = GrpcServer(address, _ignore, admin=controller, control=control)
        port = await server.start()
        self._saved = replace(self._saved, control_port=port)
        self._store.save(self._saved.to_bytes())
        self._running.push_async_callback(server.stop)
        self._target = join(called(where.control_host), port)
        self._frontend_actors = FrontendActors(self._config, port, token, self._tell)
        self._running.push_async_callback(self._frontend_actors.stop)

    async def _admit(self, public_keys: frozenset[str]) -> None:
        """Hosts let these frontends in, and a later incarnation knows."""
        self._saved = replace(self._saved, frontend_keys=tuple(sorted(public_keys)))
        self._store.save(self._saved.to_bytes())
        await self._fleet.admit(public_keys)

    def _remember(self, state: State) -> None:
        self._saved = replace(self._saved, state=state)
        self._store.save(self._saved.to_bytes())

    def _later(self, task: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, until the end."""
        self._tasks.add(asyncio.ensure_future(_or_restart(task)))

    async def _end_when_asked(self, controller: Controller) -> None:
        await controller.stop_requested.wait()
        self._is_ending = True
        self._tasks.discard(asyncio.current_task())
        await self.stop()
        end_this_process()


async def _or_restart(task: Coroutine[Any, Any, None]) -> None:
    """One that fails ends this process, and the next incarnation begins anew."""
    try:
        await task
    except Exception:
        log.exception("the controller cannot go on; Ray starts it again")
        os._exit(1)


def _say_what_changed(release: Release, layers: ServedLayers) -> None:
    """What hosts and frontends hold stays in force, and may be swapped; nobody takes more of what is not there any more as it was.

    Raises CheckpointChanged when even the layers are others.
    """
    if len(layers.sources) != len(release.placement.layers):
        raise CheckpointChanged(f"{len(release.placement.layers)} layers are served, and the checkpoint has {len(layers.sources)} now")
    try:
        for source in release.sources(layers):
            source.check()
    except ConfigError as error:
        log.warning("%s", error)


def _ignore(_method: str, _code: str, _seconds: float) -> None:
    """Nobody counts what administrators ask."""
