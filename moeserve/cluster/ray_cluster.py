"""Hosts as Ray actors: on a local Ray of their own, or on a cluster that runs."""

from __future__ import annotations

import asyncio

from moeserve.cluster.cluster import Loss, MemoryStore
from moeserve.cluster.ray_fleet import RayFleet
from moeserve.cluster.ray_loss import until_lost
from moeserve.cluster.ray_nodes import RayNodes
from moeserve.cluster.ray_runtime import RayRuntime
from moeserve.cluster.ray_store import RayStore
from moeserve.cluster.ray_where import this_node
from moeserve.config import PlacementConfig, RayConfig, ServedModel
from moeserve.loops import in_thread


class RayCluster:
    """A `Cluster` that this process starts or joins; its hosts end with it."""

    def __init__(self, model: ServedModel, placing: PlacementConfig, ray: RayConfig) -> None:
        self._runtime = RayRuntime(ray, placing)
        self.intent = "starting Ray" if ray.address is None else f"joining Ray at {ray.address}"
        self.hosts = RayFleet(model, placing, ray, detached=False)
        self.nodes = RayNodes(self.hosts)
        self.store = MemoryStore()

    @property
    def is_private(self) -> bool:
        """Whether it is a local Ray that this process has started."""
        return self._runtime.is_private

    @property
    def here(self) -> str:
        """The Ray node this process is on."""
        return this_node()

    async def start(self) -> None:
        """Takes some seconds."""
        await in_thread(self._runtime.start)  # joining a cluster may take for ever

    def open(self, service_id: str, *, is_followed: bool) -> None:
        """As `Cluster.open`."""
        self.hosts.start(service_id, over_tcp=not self.is_private or is_followed, folder=self._runtime.folder)

    async def lost(self) -> Loss:
        """Waits until a part of Ray is missing on this machine."""
        return await until_lost()

    async def stop(self) -> None:
        """Ends a local Ray, and leaves a joined cluster alone."""
        await in_thread(self._runtime.stop)


class DetachedRayCluster:
    """The `Cluster` that the process of this actor is part of; hosts outlive it, and the next incarnation adopts them."""

    intent = "using the Ray cluster this process is part of"
    is_private = False

    def __init__(self, model: ServedModel, placing: PlacementConfig, ray: RayConfig) -> None:
        self.hosts = RayFleet(model, placing, ray, detached=True)
        self.nodes = RayNodes(self.hosts)
        self.store = RayStore(ray.namespace)

    @property
    def here(self) -> str:
        """The Ray node this process is on."""
        return this_node()

    async def start(self) -> None:
        """The cluster is there already."""

    def open(self, service_id: str, *, is_followed: bool) -> None:
        """As `Cluster.open`."""
        assert is_followed, "all frontends of a deployed service are elsewhere"
        self.hosts.start(service_id)

    async def lost(self) -> Loss:
        """Waits forever: Ray ends this process, and starts it again."""
        await asyncio.Event().wait()
        raise AssertionError("it is never set")

    async def stop(self) -> None:
        """It stays."""
