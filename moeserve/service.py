"""The whole service put together: configuration -> Ray hosts, frontend, gRPC and metrics; started in order, stopped in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from moeserve.checkpoints import check_memory, host_bytes, layer_sources, memory_bytes
from moeserve.cluster import Fleet, RayRuntime
from moeserve.config import ServiceConfig
from moeserve.control import Rollout
from moeserve.errors import ConfigError
from moeserve.frontend import Frontend
from moeserve.metrics import Metrics
from moeserve.page import StatusPage
from moeserve.placement import plan_placement
from moeserve.release import Release
from moeserve.server import GrpcServer, check_exposure
from moeserve.stats import HostInfo
from moeserve.transport import KeyPair, choose_endpoint

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


class Service:
    """One service in this process: `start` it, use `target`, `stop` it. `progress` is told, in words, how the start goes."""

    def __init__(self, config: ServiceConfig, progress: Progress = log.info) -> None:
        self._config = config
        self._progress = progress
        self._running = AsyncExitStack()
        self._server: GrpcServer | None = None
        self._rollout: Rollout | None = None
        self.stop_requested = asyncio.Event()
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

    async def stop(self) -> None:
        """Refuse new requests, finish the running ones (at most server.drain_timeout_s), then stop everything."""
        await self._drain()
        await self._running.aclose()

    async def swap(self, layer: str, checkpoint: Path, experts: Sequence[int] | None = None) -> Release:
        """As `Rollout.swap`; returns what is served then."""
        assert self._rollout is not None, "a service that has started"
        return await self._rollout.swap(layer, checkpoint, experts)

    async def scale(self, num_hosts: int) -> Release:
        """As `Rollout.scale`; returns what is served then."""
        assert self._rollout is not None, "a service that has started"
        return await self._rollout.scale(num_hosts)

    async def drain(self, host: str) -> Release:
        """As `Rollout.drain`; returns what is served then."""
        assert self._rollout is not None, "a service that has started"
        return await self._rollout.drain(host)

    def ask_to_stop(self) -> None:
        """Somebody who may wants the service to end: whoever started it is told by `stop_requested`."""
        self.stop_requested.set()

    async def _start(self) -> None:
        config = self._config
        check_exposure(config.server)
        sources = layer_sources(config)
        specs = [source.spec for source in sources]
        release = Release(plan_placement(specs, config.placement))
        check_memory(host_bytes(sources, release.placement), config, memory_bytes())
        self._config = config = _with_num_hosts(config, release.placement.num_hosts)
        metrics = Metrics(specs, config.observability.expert_detail)
        runtime = RayRuntime(config.ray, config.placement)
        fleet, keys = Fleet(config, release), KeyPair.generate()
        frontend = Frontend(sources, release, fleet.find, config, metrics, self._health_changed, keys)

        self._progress("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
        self._running.callback(runtime.stop)
        runtime.start()

        # The ports come before the weights: whoever probes them is told that the service is starting.
        self._rollout = Rollout(config, release, fleet, frontend)
        self._server = GrpcServer(config.server, metrics.observe_call, engine=frontend, admin=self)
        self._running.push_async_callback(self._drain)
        self.target = f"{config.server.host}:{await self._server.start()}"
        self.metrics_target = f"{config.server.host}:{self._start_metrics(metrics, frontend)}"

        self._progress(
            f"loading {sum(spec.num_experts for spec in specs)} experts of {len(specs)} layers on {len(release.placement.hosts)} hosts"
        )
        self._running.push_async_callback(fleet.stop)
        fleet.start(runtime.private_dir, keys.public)
        await fleet.wait(partial(self._host_ready, runtime.node_id))
        self._running.push_async_callback(frontend.close)
        await frontend.start(runtime.node_id)

    def _start_metrics(self, metrics: Metrics, frontend: Frontend) -> int:
        host, port = self._config.server.host, self._config.server.metrics_port
        try:
            page = StatusPage(host, port, metrics.registry, frontend.stats)
        except OSError as error:
            raise ConfigError(f"server.metrics_port: {host}:{port} cannot be listened on: {error.strerror}") from None
        self._running.callback(page.stop)
        return page.port

    def _host_ready(self, here: str, info: HostInfo) -> None:
        self.hosts.append(info)
        gpus = f", CUDA_VISIBLE_DEVICES={info.cuda_visible_devices}" if info.cuda_visible_devices else ""
        channel = choose_endpoint(info.endpoints, is_same_node=info.node == here).partition(":")[0]
        self._progress(
            f"{info.name} ready on {info.device}{gpus}: {info.weights_bytes / 2**20:.1f} MiB, {info.num_threads} threads, "
            f"reached over {channel}, pid {info.pid} ({len(self.hosts)} of {self._config.placement.num_hosts})"
        )

    def _health_changed(self, layer: int, healthy: bool) -> None:
        assert self._server is not None
        self._server.set_serving(layer, healthy)

    async def _drain(self) -> None:
        if self._server is not None:
            await self._server.drain(self._config.server.drain_timeout_s)


def _with_num_hosts(config: ServiceConfig, num_hosts: int) -> ServiceConfig:
    """What placement.experts_per_host left open, written down for everyone who reads the configuration."""
    placement = config.placement.model_copy(update={"num_hosts": num_hosts})
    return config.model_copy(update={"placement": placement})
