"""What decides which hosts there are and what they hold, on whatever cluster they run."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from moeserve.checkpoints import ServedLayers, host_bytes, memory_warning
from moeserve.cluster.cluster import Cluster, Loss
from moeserve.config import FrontendConfig, ServedModel, ServiceConfig
from moeserve.control import Controller, Frontends, Planner, Saved, State, first_state, timing
from moeserve.errors import CheckpointChanged, ConfigError, ExpertUnavailable
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import choose_endpoint

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


class ControllerProgram:
    """`prepare`, let administrators and frontends in, `bring_up`, `keep`; `stop` undoes all of it.

    Where the cluster's store holds the state of an earlier incarnation, its hosts and frontends are found again. `tell` hears, in words,
    how it goes.
    """

    def __init__(self, config: ServiceConfig, cluster: Cluster, tell: Tell) -> None:
        self.cluster = cluster
        self._config = config
        self._tell = tell
        self._running = AsyncExitStack()
        self._prepared: _Prepared | None = None
        self._is_first = True
        self._tasks: set[asyncio.Task[None]] = set()
        #: what hosts said of themselves when they were started
        self.hosts: list[HostInfo] = []

    @property
    def layers(self) -> ServedLayers:
        """What the configuration serves."""
        return self._known.layers

    @property
    def controller(self) -> Controller:
        """Changes what is served."""
        return self._known.controller

    @property
    def frontends(self) -> Frontends:
        """Those that follow."""
        return self._known.frontends

    @property
    def saved(self) -> Saved:
        """What the next incarnation will know."""
        return self._known.saved

    async def prepare(self, *, is_followed: bool) -> None:
        """Until it is known what is served and where; `is_followed`: frontends of other processes reach hosts, too.

        Raises ConfigError, before anything starts where that is possible.
        """
        config, cluster = self._config, self.cluster
        layers = await asyncio.to_thread(ServedLayers.read, config.only(ServedModel))
        planner = Planner(layers, config.placement, on_this_machine=config.ray.address is None)
        planner.first_num_hosts()
        self._tell(cluster.intent)
        self._running.push_async_callback(cluster.stop)
        await cluster.start()
        saved = await self._load(planner)
        frontends = Frontends(
            saved.service_id, config.only(FrontendConfig), config.server.drain_timeout_s, self._admit, saved.frontend_keys
        )
        frontends.begin(saved.state.release)
        controller = Controller(planner, saved.state, cluster.nodes, cluster.hosts, frontends, self._remember)
        self._prepared = _Prepared(layers, controller, frontends, saved)
        self._running.push_async_callback(controller.end)
        cluster.open(saved.service_id, is_followed=is_followed)
        self._running.push_async_callback(cluster.hosts.stop)

    async def bring_up(self) -> None:
        """Until every host can be asked. Raises what a host raised, or ExpertUnavailable when the cluster is lost meanwhile."""
        hosts, state = self.cluster.hosts, self.saved.state
        await hosts.admit(self.saved.frontend_keys)
        if self._is_first:
            self._warn_of_memory(state.release)
            num_experts = sum(spec.num_experts for spec in self.layers.specs)
            self._tell(f"loading {num_experts} experts of {len(self.layers.specs)} layers on {len(state.assignments)} hosts")
            work = hosts.take(state.release, state.assignments, self._host_ready)
        else:
            work = hosts.adopt(state.release, state.assignments)
        await self._unless_lost(self.controller.begin(work))
        self._later(hosts.watch(self.frontends.directory))

    async def keep(self) -> None:
        """From now on, follow nodes and hosts; those that followed an earlier incarnation are waited for first."""
        if not self._is_first:
            await self.frontends.until_back(timing.BACK_S)
        self._later(self.controller.keep())

    async def lost(self) -> Loss:
        """Until hosts that end cannot come back: those that there are serve on."""
        loss = await self.cluster.lost()
        log.error("no host that is lost will come back: %s", loss.why)
        self._stop_tasks()
        self.cluster.hosts.lose(f"no host comes back: {loss.why}")
        self.frontends.set_failing(self.cluster.hosts.failing)
        return loss

    async def failed(self) -> None:
        """Until something fails that goes on until the end. Raises what it raised."""
        while True:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def stop(self) -> None:
        """End the hosts, and what was started; nothing is left for another incarnation."""
        tasks = self._stop_tasks()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._running.aclose()
        self.cluster.store.clear()

    def remember(self, **changes: Any) -> None:
        """Something that the next incarnation must know is different now."""
        self._known.saved = replace(self._known.saved, **changes)
        self.cluster.store.save(self._known.saved.to_bytes())

    async def _load(self, planner: Planner) -> Saved:
        data = self.cluster.store.load()
        if data is not None:
            self._is_first = False
            saved = Saved.from_bytes(data)
            await asyncio.to_thread(_say_what_changed, saved.state.release, planner.layers)
            return saved
        state = await first_state(planner, self.cluster.nodes)
        saved = Saved(secrets.token_hex(6), secrets.token_hex(32), state)
        self.cluster.store.save(saved.to_bytes())
        return saved

    async def _admit(self, public_keys: frozenset[str]) -> None:
        """Hosts let these frontends in, and a later incarnation knows."""
        self.remember(frontend_keys=tuple(sorted(public_keys)))
        await self.cluster.hosts.admit(public_keys)

    def _remember(self, state: State) -> None:
        self.remember(state=state)

    @property
    def _known(self) -> _Prepared:
        assert self._prepared is not None, "a controller that has been prepared"
        return self._prepared

    def _warn_of_memory(self, release: Release) -> None:
        is_here = self.cluster.is_private and not self._config.placement.gpus_per_host
        if is_here and (warning := memory_warning(host_bytes(self.layers.sources, release.placement))):
            self._tell(f"warning: {warning}")

    def _host_ready(self, info: HostInfo) -> None:
        self.hosts.append(info)
        gpus = f", CUDA_VISIBLE_DEVICES={info.cuda_visible_devices}" if info.cuda_visible_devices else ""
        channel = choose_endpoint(info.endpoints, is_same_node=info.node == self.cluster.here).partition(":")[0]
        self._tell(
            f"{info.name} ready on {info.device}{gpus} of node {info.node[:12]}: {info.weights_bytes / 2**20:.1f} MiB, "
            f"{info.num_threads} threads, reached over {channel}, pid {info.pid} ({len(self.hosts)} of {len(self.saved.state.assignments)})"
        )

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Beside everything else, until the end."""
        self._tasks.add(asyncio.create_task(work))

    def _stop_tasks(self) -> set[asyncio.Task[None]]:
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def _unless_lost(self, work: Coroutine[Any, Any, None]) -> None:
        working, losing = asyncio.create_task(work), asyncio.create_task(self.cluster.lost())
        try:
            await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.cluster.hosts.lose(losing.result().why)
                raise ExpertUnavailable(f"no host can be started: {losing.result().why}")
            await working
        finally:
            for task in (working, losing):
                task.cancel()
            await asyncio.gather(working, losing, return_exceptions=True)


class _Prepared:
    """What there is once a controller knows what it serves."""

    def __init__(self, layers: ServedLayers, controller: Controller, frontends: Frontends, saved: Saved) -> None:
        self.layers, self.controller, self.frontends, self.saved = layers, controller, frontends, saved


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
