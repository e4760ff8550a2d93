"""The whole service put together: configuration -> Ray hosts, frontend, gRPC and metrics; started in order, stopped in reverse."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from moeserve.addresses import called, join
from moeserve.checkpoints import LayerSource, ServedLayers, host_bytes, memory_warning
from moeserve.cluster import Fleet, RayNodes, RayRuntime, until_lost
from moeserve.config import ServedModel, ServiceConfig
from moeserve.control import Controller, FrontendInfo, Frontends, Planner, State, first_state
from moeserve.errors import ConfigError, ExpertUnavailable, MoEServeError
from moeserve.frontend import Frontend, FrontendSettings, HostAccess
from moeserve.observe.metrics import Metrics
from moeserve.observe.page import StatusPage
from moeserve.observe.stats import HostInfo
from moeserve.release import Release
from moeserve.server import Control, GrpcServer, check_exposure, frontend_tokens
from moeserve.transport import KeyPair, choose_endpoint

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Service:
    """One service in this process: `start` it, use `target`, `stop` it. `progress` is told, in words, how the start goes."""

    def __init__(self, config: ServiceConfig, progress: Progress = log.info) -> None:
        self._config = config
        self._progress = unfailing(progress)
        self._running = AsyncExitStack()
        self._server: GrpcServer | None = None
        self._controller: Controller | None = None
        self._healthy: dict[int, bool] = {}
        #: some expert cannot be had
        self._is_ailing = asyncio.Event()
        #: what keeps it from going on
        self.failure: MoEServeError | None = None
        self._broken = asyncio.Event()
        self.hosts: list[HostInfo] = []
        #: host:port of the gRPC service, and of the metrics endpoint
        self.target = ""
        self.metrics_target = ""

    async def start(self) -> None:
        """Until every host is ready and health says SERVING. What was started is stopped again when something fails.

        Raises ConfigError (wrong settings, files, ports or resources) or what a host raised.
        """
        try:
            await self._start()
        except BaseException:
            await self._running.aclose()
            raise

    @property
    def controller(self) -> Controller:
        """Changes what is served."""
        assert self._controller is not None, "a service that has started"
        return self._controller

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
        await self._drain()
        await self._running.aclose()

    async def hurry(self) -> None:
        """While `stop` waits for running requests: cancel them instead."""
        if self._server is not None:
            await self._server.stop()

    async def _start(self) -> None:
        config = self._config
        check_exposure(config.server)
        layers = await asyncio.to_thread(ServedLayers.read, config.only(ServedModel))
        planner, specs = Planner(layers, config.placement, on_this_machine=config.ray.address is None), layers.specs
        planner.first_num_hosts()  # what cannot be is said before anything starts
        metrics, runtime = Metrics(specs, config.observability.expert_detail), RayRuntime(config.ray, config.placement)
        fleet, keys = Fleet(layers.model, config.placement, config.ray, detached=False), KeyPair.generate()

        self._progress("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
        self._running.push_async_callback(asyncio.to_thread, runtime.stop)
        await asyncio.to_thread(runtime.start)
        state = await first_state(planner, nodes := RayNodes(fleet))
        self._warn_of_memory(state.release, layers.sources, runtime)
        hosts = HostAccess(fleet.find, keys, self._health_changed)
        frontend = await asyncio.to_thread(self._frontend, state.release, layers, hosts, metrics)

        async def admit(followers: frozenset[str]) -> None:
            await fleet.admit({keys.public, *followers})

        # The ports come before the weights: whoever probes them is told that the service is starting.
        service_id = secrets.token_hex(8)
        frontends = Frontends(service_id, config, config.server.drain_timeout_s, admit)
        frontends.include(frontend, lambda: self._info(frontend, runtime.node_id))
        frontends.begin(state.release)
        self._controller = Controller(planner, state, nodes, fleet, frontends, _forget, config.server.drain_timeout_s)
        self._running.push_async_callback(self._controller.end)
        control = Control(frontends, frontend_tokens(config.controller))
        await self._listen(frontend, control, metrics)

        num_hosts = len(state.assignments)
        self._progress(f"loading {sum(spec.num_experts for spec in specs)} experts of {len(specs)} layers on {num_hosts} hosts")
        self._running.push_async_callback(fleet.stop)
        fleet.start(service_id, over_tcp=not runtime.is_private or bool(control.tokens), folder=runtime.folder)
        await admit(frozenset())
        take = fleet.take(state.release, state.assignments, partial(self._host_ready, runtime.node_id, num_hosts))
        await _unless_lost(self._controller.begin(take), fleet)
        self._running.push_async_callback(frontend.close)
        await frontend.start(runtime.node_id)
        tasks = [self._later(fleet.watch(frontends.directory)), self._later(self._controller.keep())]
        self._later(self._end_with_ray(fleet, frontends, tasks))

    def _warn_of_memory(self, release: Release, sources: Sequence[LayerSource], runtime: RayRuntime) -> None:
        is_here = runtime.is_private and not self._config.placement.gpus_per_host
        if is_here and (warning := memory_warning(host_bytes(sources, release.placement))):
            self._progress(f"warning: {warning}")

    def _frontend(self, release: Release, layers: ServedLayers, hosts: HostAccess, metrics: Metrics) -> Frontend:
        """It reads every gate."""
        settings = FrontendSettings.of(self._config, self._config.server)
        return Frontend(release, release.sources(layers), settings, hosts, metrics)

    async def _listen(self, frontend: Frontend, control: Control, metrics: Metrics) -> None:
        server = self._config.server
        followed = control if control.tokens else None
        self._server = GrpcServer(server, metrics.observe_call, engine=frontend, admin=self._controller, control=followed)
        self._running.push_async_callback(self._drain)
        host = called(server.host)
        self.target = join(host, await self._server.start())
        self.metrics_target = join(host, self._start_metrics(metrics, frontend))

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Beside everything else, until the end."""
        task = asyncio.create_task(work)
        self._running.callback(task.cancel)
        return task

    async def _end_with_ray(self, fleet: Fleet, frontends: Frontends, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Without Ray no host comes back: those that there are serve on, as long as they have all experts."""
        loss = await until_lost()
        log.error("no host that is lost will come back: %s", loss.why)
        for task in tasks:
            task.cancel()
        fleet.lose_ray(f"no host comes back: {loss.why}")
        frontends.set_failing(fleet.failing)
        if not loss.is_final:
            await self._is_ailing.wait()
        self.failure = ExpertUnavailable(f"this service cannot go on, and must be started anew: {loss.why}")
        self._broken.set()

    def _info(self, frontend: Frontend, node: str) -> FrontendInfo:
        is_ready = bool(self._healthy) and all(self._healthy.values())
        return FrontendInfo("serve", self.target, self.metrics_target, node, frontend.epoch, frontend.oldest_epoch, is_ready)

    def _start_metrics(self, metrics: Metrics, frontend: Frontend) -> int:
        host, port = self._config.server.host, self._config.server.metrics_port
        try:
            page = StatusPage(host, port, metrics.registry, frontend.stats)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: {join(host, port)} cannot be listened on: {error.strerror}") from None
        self._running.callback(page.stop)
        return page.port

    def _host_ready(self, here: str, num_hosts: int, info: HostInfo) -> None:
        self.hosts.append(info)
        gpus = f", CUDA_VISIBLE_DEVICES={info.cuda_visible_devices}" if info.cuda_visible_devices else ""
        channel = choose_endpoint(info.endpoints, is_same_node=info.node == here).partition(":")[0]
        self._progress(
            f"{info.name} ready on {info.device}{gpus}: {info.weights_bytes / 2**20:.1f} MiB, {info.num_threads} threads, "
            f"reached over {channel}, pid {info.pid} ({len(self.hosts)} of {num_hosts})"
        )

    def _health_changed(self, layer: int, healthy: bool) -> None:
        assert self._server is not None
        self._healthy[layer] = healthy
        (self._is_ailing.clear if all(self._healthy.values()) else self._is_ailing.set)()
        self._server.set_serving(layer, healthy)

    async def _drain(self) -> None:
        if self._server is not None:
            await self._server.drain(self._config.server.drain_timeout_s)


async def _unless_lost(work: Coroutine[Any, Any, None], fleet: Fleet) -> None:
    """Until it is done. Raises ExpertUnavailable when Ray is lost before."""
    working, losing = asyncio.ensure_future(work), asyncio.ensure_future(until_lost())
    try:
        await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            fleet.lose_ray(losing.result().why)
            raise ExpertUnavailable(f"no host can be started: {losing.result().why}")
        await working
    finally:
        for task in (working, losing):
            task.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)


def unfailing(progress: Progress) -> Progress:
    """What is told to people decides nothing: not even when nobody can be told."""

    def tell(line: str) -> None:
        try:
            progress(line)
        except Exception as error:
            log.debug("could not tell %r: %s", line, error)

    return tell


def _forget(_state: State) -> None:
    """Nothing of the service outlives this process, so nobody needs to know."""
