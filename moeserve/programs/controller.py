"""The controller as a program: decides which hosts run and what they hold, on any cluster."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

from moeserve.checkpoints import ServedLayers, host_bytes, in_memory, memory_warning
from moeserve.cluster.cluster import Cluster, Loss
from moeserve.config import FrontendConfig, ServedModel, ServiceConfig
from moeserve.control import Planner, State, timing
from moeserve.control.controller import Controller
from moeserve.control.first_state import first_state
from moeserve.control.frontends import Frontends
from moeserve.control.saved import Saved
from moeserve.errors import CheckpointChanged, ConfigError, ExpertUnavailable, MoEServeError, number_of
from moeserve.loops import in_thread
from moeserve.observe.audit import AuditEvent
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.transport import choose_endpoint

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


class EndedBeforeReady(MoEServeError):
    """An administrator has ended the service while it started."""


class ControllerProgram:
    """Call `prepare`, then listen for administrators and frontends, then `bring_up` and `keep`; `stop` undoes all of it.

    If the cluster's store holds the state of an earlier incarnation, its hosts and frontends are adopted. `tell` receives lines of
    progress.
    """

    def __init__(self, config: ServiceConfig, cluster: Cluster, tell: Tell) -> None:
        self.cluster = cluster
        self._config = config
        self._tell = tell
        self._running = AsyncExitStack()
        self._prepared: _Prepared | None = None
        self._is_first = True
        self._tasks: set[asyncio.Task[None]] = set()
        #: hosts as they described themselves when they started
        self.hosts: list[HostInfo] = []

    @property
    def layers(self) -> ServedLayers:
        """The layers of the configuration."""
        return self._known.layers

    @property
    def controller(self) -> Controller:
        """Changes what is served."""
        return self._known.controller

    @property
    def frontends(self) -> Frontends:
        """The frontends that follow this controller."""
        return self._known.frontends

    @property
    def saved(self) -> Saved:
        """The state that the next incarnation will load."""
        return self._known.saved

    async def prepare(self, *, is_followed: bool) -> None:
        """Decide what is served and where; `is_followed`: frontends of other processes reach hosts, too.

        Raises ConfigError, before anything starts where that is possible.
        """
        config, cluster = self._config, self.cluster
        layers = await in_thread(ServedLayers.read, config.only(ServedModel))
        planner = Planner(layers, config.placement, config.ray.address is None, config.balancing, config.autoscaling)
        planner.first_num_hosts()
        if config.autoscaling.enabled:
            await in_thread(planner.bounds)
        self._tell(cluster.intent)
        self._running.push_async_callback(cluster.stop)
        await cluster.start()
        saved = await self._load(planner)
        frontends = Frontends(
            saved.service_id, config.only(FrontendConfig), config.server.drain_timeout_s, self._admit, saved.frontend_keys
        )
        frontends.begin(saved.state.release)
        controller = Controller(planner, saved.state, cluster.nodes, cluster.hosts, frontends, self._remember)
        controller.audit.go_on(saved.events, self._remember_events)
        self._prepared = _Prepared(layers, controller, frontends, saved)
        self._running.push_async_callback(controller.end)
        cluster.open(saved.service_id, is_followed=is_followed)
        self._running.push_async_callback(cluster.hosts.stop)

    async def bring_up(self) -> None:
        """Start hosts, until all are ready, or adopt them.

        Raises a host's error, ExpertUnavailable when the cluster is lost meanwhile, EndedBeforeReady when an administrator asks for it.
        """
        hosts, state = self.cluster.hosts, self.saved.state
        await hosts.admit(self.saved.frontend_keys)
        if self._is_first:
            self._warn_of_memory(state.release)
            experts = number_of(sum(spec.num_experts for spec in self.layers.specs), "expert")
            self._tell(f"loading {experts} of {number_of(len(self.layers.specs), 'layer')} on {number_of(len(state.assignments), 'host')}")
            work = hosts.take(state.release, state.assignments, self._host_ready)
        else:
            work = hosts.adopt(state.release, state.assignments)
        why = "the service starts" if self._is_first else "the controller was started again"
        await self.unless_over(self.controller.begin(work, why))
        self._later(hosts.watch(self.frontends.directory))

    async def keep(self) -> None:
        """Reconcile from now on; first wait for frontends of an earlier incarnation, which may have died in the middle of a change."""
        if not self._is_first:
            epoch = self.saved.state.release.epoch
            await self.frontends.until_back(timing.BACK_S)
            await self.frontends.drained()
            await self.cluster.hosts.retire(epoch)
        self._later(self.controller.keep())

    async def lost(self) -> Loss:
        """Returns when hosts cannot be restarted any more; running hosts keep serving."""
        loss = await self.cluster.lost()
        log.error("hosts cannot be restarted any more: %s", loss.why)
        self._stop_tasks()
        self.cluster.hosts.lose(f"hosts cannot be restarted: {loss.why}")
        self.frontends.set_failing(self.cluster.hosts.failing)
        return loss

    async def failed(self) -> None:
        """Raises the error of the first background task that fails."""
        while True:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def abandon_changes(self) -> None:
        """The first step of a stop: nobody waits for a change any more."""
        if self._prepared is not None:
            await self.controller.abandon()

    async def stop(self) -> None:
        """End the hosts and everything that was started, and delete the saved state."""
        await self.abandon_changes()
        tasks = self._stop_tasks()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._running.aclose()
        self.cluster.store.clear()

    def remember(self, **changes: Any) -> None:
        """Save changes for the next incarnation."""
        self._known.saved = replace(self._known.saved, **changes)
        self.cluster.store.save(self._known.saved.to_bytes())

    async def _load(self, planner: Planner) -> Saved:
        data = self.cluster.store.load()
        if data is not None:
            self._is_first = False
            saved = Saved.from_bytes(data)
            await in_thread(_say_what_changed, saved.state.release, planner.layers)
            return saved
        state = await first_state(planner, self.cluster.nodes)
        saved = Saved(secrets.token_hex(6), secrets.token_hex(32), state)
        self.cluster.store.save(saved.to_bytes())
        return saved

    async def _admit(self, public_keys: frozenset[str]) -> None:
        """Hosts accept these frontends from now on; a later incarnation knows them."""
        self.remember(frontend_keys=tuple(sorted(public_keys)))
        await self.cluster.hosts.admit(public_keys)

    def _remember(self, state: State) -> None:
        before = self.saved.state
        try:
            self.remember(state=state)
        except BaseException:  # the change is not made, though Ray may get its state later
            with suppress(Exception):
                self.remember(state=before)
            raise

    def _remember_events(self, events: tuple[AuditEvent, ...]) -> None:
        self.remember(events=events)

    @property
    def _known(self) -> _Prepared:
        assert self._prepared is not None, "a controller that has been prepared"
        return self._prepared

    def _warn_of_memory(self, release: Release) -> None:
        placing, sources = self._config.placement, self.layers.sources
        nbytes = in_memory(host_bytes(sources, release.placement), sources, placing, self._config.store)
        if self.cluster.is_private and not placing.gpus_per_host and (warning := memory_warning(nbytes)):
            self._tell(f"warning: {warning}")

    def _host_ready(self, info: HostInfo) -> None:
        self.hosts.append(info)
        gpus = f", CUDA_VISIBLE_DEVICES={info.cuda_visible_devices}" if info.cuda_visible_devices else ""
        channel = choose_endpoint(info.endpoints, is_same_node=info.node == self.cluster.here).partition(":")[0]
        threads, number = number_of(info.num_threads, "thread"), f"{len(self.hosts)} of {len(self.saved.state.assignments)}"
        self._tell(
            f"{info.name} ready on {info.device}{gpus} of node {info.node[:12]}: {info.weights_bytes / 2**20:.1f} MiB, "
            f"{threads}, reached over {channel}, pid {info.pid} ({number})"
        )

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run in the background, until `stop`."""
        self._tasks.add(asyncio.create_task(work))

    def _stop_tasks(self) -> set[asyncio.Task[None]]:
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def unless_over(self, work: Coroutine[Any, Any, None]) -> None:
        """A part of the start. Raises its error, and ExpertUnavailable and EndedBeforeReady as `bring_up`."""
        working, losing = asyncio.create_task(work), asyncio.create_task(self.cluster.lost())
        ending = asyncio.create_task(self._ended_before_ready())
        tasks: tuple[asyncio.Task[Any], ...] = working, losing, ending
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if losing.done() and not working.done():
                self.cluster.hosts.lose(losing.result().why)
                raise ExpertUnavailable(f"hosts cannot be started: {losing.result().why}")
            await (working if working.done() else ending)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ended_before_ready(self) -> None:
        """Raises it. A later incarnation is ready soon, and ends then, in order."""
        await self.controller.stop_requested.wait()
        if not self._is_first:
            await asyncio.Event().wait()
        raise EndedBeforeReady("an administrator has ended this service before it was ready")


class _Prepared:
    """What a controller has after `prepare`."""

    def __init__(self, layers: ServedLayers, controller: Controller, frontends: Frontends, saved: Saved) -> None:
        self.layers, self.controller, self.frontends, self.saved = layers, controller, frontends, saved


def _say_what_changed(release: Release, layers: ServedLayers) -> None:
    """Log whether files have changed since the release was made: they are not read again, but a swap can replace them.

    Raises CheckpointChanged when the number of layers differs.
    """
    if len(layers.sources) != len(release.placement.layers):
        served = number_of(len(release.placement.layers), "layer")
        raise CheckpointChanged(f"the service has {served}, and the checkpoint has {len(layers.sources)} now")
    try:
        for source in release.sources(layers):
            source.check()
    except ConfigError as error:
        log.warning("%s", error)
