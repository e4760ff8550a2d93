"""A placement's hosts as Ray actors: started side by side, found again after a restart, stopped together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from moeserve.cluster.expert_host import ExpertHost, FrontendAddress, HostOrder
from moeserve.config import PlacementConfig, ServiceConfig
from moeserve.errors import ConfigError, ExpertUnavailable
from moeserve.release import Release
from moeserve.stats import HostInfo

log = logging.getLogger(__name__)

_RETRY_S = 0.1
_STOP_TIMEOUT_S = 5.0
_MEET_TIMEOUT_S = 5.0


class Fleet:
    """All hosts, and the releases they have: one, or two while the second is brought in."""

    def __init__(self, config: ServiceConfig, release: Release) -> None:
        self._config = config
        self._releases = [release]
        self._actors: list[ActorHandle[ExpertHost]] = []
        self._directory: dict[int, HostInfo] = {}
        self.names = [f"host-{number}" for number in range(release.placement.num_hosts)]

    def start(self, socket_dir: Path, frontend_key: str) -> None:
        """Ask Ray for every host at once, spread over the nodes.

        Hosts on this node put their sockets into `socket_dir`, a private folder; others admit the frontend by its public key.
        Raises ConfigError when the cluster cannot hold them.
        """
        check_resources(self._config.placement)
        wanted = self._config.placement
        host = ExpertHost.options(  # type: ignore[attr-defined]
            num_cpus=wanted.cpus_per_host,
            num_gpus=wanted.gpus_per_host,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=0,
        )
        frontend = FrontendAddress(ray.get_runtime_context().get_node_id(), socket_dir, frontend_key)
        for number, name in enumerate(self.names):
            self._actors.append(host.remote(HostOrder(name, number, self._config, frontend)))

    async def wait(self, on_ready: Callable[[HostInfo], None]) -> None:
        """Until every host is ready; `on_ready` tells of each. Raises what a host raised, for example CheckpointError."""
        waiting = [asyncio.ensure_future(self.find(number)) for number in range(len(self._actors))]
        try:
            for next_ready in asyncio.as_completed(waiting):
                on_ready(await next_ready)
        finally:
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def find(self, number: int) -> HostInfo:
        """The present incarnation of a host, once it is ready; while Ray restarts it, waits.

        Raises ExpertUnavailable when Ray has given the host up, or what the host raised.
        """
        while True:
            try:
                info: HostInfo = await self._actors[number].start.remote(self._releases)
                await self._introduce(number, info)
                return info
            except ActorUnavailableError:
                await asyncio.sleep(_RETRY_S)
            except RayActorError as error:
                raise ExpertUnavailable(f"{self.names[number]} is gone for good: {str(error).splitlines()[0]}") from None
            except RayTaskError as error:
                raise error.cause from None

    async def take(self, release: Release) -> None:
        """Every host loads what is new in `release`; one that dies meanwhile comes back with it. Raises what a host raised."""
        self._releases.append(release)
        await asyncio.gather(*(self._tell(number, lambda actor: actor.take.remote(release)) for number in range(len(self._actors))))

    async def withdraw(self, epoch: int) -> None:
        """Hosts forget a release that will not be."""
        self._releases = [release for release in self._releases if release.epoch < epoch]
        await asyncio.gather(*(self._tell(number, lambda actor: actor.withdraw.remote(epoch)) for number in range(len(self._actors))))

    async def retire(self, epoch: int) -> None:
        """Hosts forget what was before the release of `epoch`."""
        self._releases = [release for release in self._releases if release.epoch >= epoch]
        await asyncio.gather(*(self._tell(number, lambda actor: actor.retire.remote(epoch)) for number in range(len(self._actors))))

    async def _tell(self, number: int, call: Callable[[ActorHandle[ExpertHost]], Awaitable[None]]) -> None:
        """`call` an actor; one that has died knows when it is found again, because it then starts with the releases in force."""
        while True:
            await self.find(number)
            try:
                await call(self._actors[number])
                return
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                log.info("%s was lost meanwhile: %s", self.names[number], str(error).splitlines()[0])

    async def _introduce(self, number: int, info: HostInfo) -> None:
        """Tells all hosts of all hosts, once all have been found, and again of every new incarnation."""
        if self._directory.get(number) == info:
            return
        self._directory[number] = info
        if len(self._directory) < len(self._actors):
            return
        meetings = [asyncio.ensure_future(_met(actor.meet.remote(self._directory))) for actor in self._actors]
        await asyncio.wait(meetings, timeout=_MEET_TIMEOUT_S)

    async def stop(self) -> None:
        """Stop the hosts, whatever state they are in."""
        stops: list[Any] = [actor.stop.remote() for actor in self._actors]
        if stops:
            await asyncio.to_thread(ray.wait, stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        self._directory.clear()


async def _met(meeting: Awaitable[None]) -> None:
    try:
        await meeting
    except RayActorError as error:
        # A host that is gone is introduced when it is found again; until then rows are sent to each host directly.
        log.info("a host missed who the others are: %s", str(error).splitlines()[0])


def check_resources(placement: PlacementConfig) -> None:
    """Raises ConfigError unless the live nodes can hold all hosts; Ray itself would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, key, each in (("CPU", "cpus_per_host", placement.cpus_per_host), ("GPU", "gpus_per_host", placement.gpus_per_host)):
        if not each:
            continue
        room = sum(int(node.get(resource, 0) / each + 1e-9) for node in nodes)
        if room < placement.num_hosts:
            there = " + ".join(f"{node.get(resource, 0):g}" for node in nodes)
            raise ConfigError(
                f"placement.num_hosts is {placement.num_hosts} and each takes placement.{key} = {each:g}, "
                f"but the cluster has {there} {resource}s: room for {room} hosts"
            )
