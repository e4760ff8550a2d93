"""A placement's hosts as Ray actors: started side by side, found again after a restart, stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeserve.cluster.expert_host import ExpertHost, FrontendAddress, HostOrder
from moeserve.config import PlacementConfig, ServiceConfig
from moeserve.errors import ConfigError, ExpertUnavailable
from moeserve.release import Release
from moeserve.stats import HostInfo

log = logging.getLogger(__name__)

_RETRY_S = 0.1
_STOP_TIMEOUT_S = 5.0
_MEET_TIMEOUT_S = 5.0

Call = Callable[[ActorHandle[ExpertHost]], Awaitable[None]]


class Fleet:
    """All hosts, by number, and the releases they have: one, or two while the second is brought in."""

    def __init__(self, config: ServiceConfig, release: Release) -> None:
        self._config = config
        self._releases = [release]
        self._actors: dict[int, ActorHandle[ExpertHost]] = {}
        self._directory: dict[int, HostInfo] = {}
        self._frontend: FrontendAddress | None = None

    def start(self, socket_dir: Path, frontend_key: str) -> None:
        """Ask Ray for every host at once, spread over the nodes.

        Hosts on this node put their sockets into `socket_dir`, a private folder; others admit the frontend by its public key.
        Raises ConfigError when the cluster cannot hold them.
        """
        self._frontend = FrontendAddress(ray.get_runtime_context().get_node_id(), socket_dir, frontend_key)
        self._add(self._releases[-1].placement.hosts)

    def _add(self, numbers: Sequence[int]) -> None:
        """Ask Ray for these hosts, beside those there are."""
        assert self._frontend is not None, "the fleet was started"
        check_resources(self._config.placement, len(self._actors) + len(numbers))
        wanted = self._config.placement
        host = ExpertHost.options(  # type: ignore[attr-defined]
            num_cpus=wanted.cpus_per_host,
            num_gpus=wanted.gpus_per_host,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=0,
        )
        for number in numbers:
            self._actors[number] = host.remote(HostOrder(_name(number), number, self._config, self._frontend))

    async def wait(self, on_ready: Callable[[HostInfo], None]) -> None:
        """Until every host is ready; `on_ready` tells of each. Raises what a host raised, for example CheckpointError."""
        waiting = [asyncio.ensure_future(self.find(number)) for number in self._actors]
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
            if number not in self._actors:
                raise ExpertUnavailable(f"{_name(number)} has left")
            try:
                info: HostInfo = await self._actors[number].start.remote(self._releases)
                await self._introduce(number, info)
                return info
            except ActorUnavailableError:
                await asyncio.sleep(_RETRY_S)
            except RayActorError as error:
                raise ExpertUnavailable(f"{_name(number)} is gone for good: {str(error).splitlines()[0]}") from None
            except RayTaskError as error:
                raise error.cause from None

    async def take(self, release: Release) -> None:
        """Every host of `release`, started if need be, loads what is new in it; one that dies meanwhile comes back with it.

        Raises ConfigError when the cluster cannot hold the new ones, or what a host raised.
        """
        self._releases.append(release)
        self._add([number for number in release.placement.hosts if number not in self._actors])
        await self._tell(release.placement.hosts, lambda actor: actor.take.remote(release))

    async def withdraw(self, epoch: int) -> None:
        """Hosts forget a release that will not be."""
        self._releases = [release for release in self._releases if release.epoch < epoch]
        await self._tell(self._releases[-1].placement.hosts, lambda actor: actor.withdraw.remote(epoch))

    async def retire(self, epoch: int) -> None:
        """Hosts forget what was before the release of `epoch`."""
        self._releases = [release for release in self._releases if release.epoch >= epoch]
        await self._tell(self._releases[-1].placement.hosts, lambda actor: actor.retire.remote(epoch))

    async def remove(self, numbers: Sequence[int]) -> None:
        """Stop these hosts for good; the others stop talking to them."""
        leaving = [self._actors.pop(number) for number in numbers if number in self._actors]
        known = [self._directory.pop(number) for number in numbers if number in self._directory]
        await _stop(leaving)
        await asyncio.to_thread(_end_processes, known)
        if leaving:
            await self._meet()

    async def _tell(self, numbers: Sequence[int], call: Call) -> None:
        """`call` these hosts; those that leave may be dead for good, and are not waited for."""
        await asyncio.gather(*(self._tell_one(number, call) for number in numbers))

    async def _tell_one(self, number: int, call: Call) -> None:
        """`call` an actor; one that has died knows when it is found again, because it then starts with the releases in force."""
        while True:
            await self.find(number)
            try:
                await call(self._actors[number])
                return
            except RayTaskError as error:
                raise error.cause from None
            except RayActorError as error:
                log.info("%s was lost meanwhile: %s", _name(number), str(error).splitlines()[0])

    async def _introduce(self, number: int, info: HostInfo) -> None:
        """Tells all hosts of all hosts, once all have been found, and again of every new incarnation."""
        if self._directory.get(number) == info:
            return
        self._directory[number] = info
        if len(self._directory) < len(self._actors):
            return
        await self._meet()

    async def _meet(self) -> None:
        meetings = [asyncio.ensure_future(_met(actor.meet.remote(self._directory))) for actor in self._actors.values()]
        if meetings:
            await asyncio.wait(meetings, timeout=_MEET_TIMEOUT_S)

    async def stop(self) -> None:
        """Stop the hosts, whatever state they are in."""
        await _stop(list(self._actors.values()))
        self._actors.clear()
        self._directory.clear()


async def _stop(actors: Sequence[ActorHandle[ExpertHost]]) -> None:
    stops: list[Any] = [actor.stop.remote() for actor in actors]
    if stops:
        await asyncio.to_thread(ray.wait, stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)
    for actor in actors:
        ray.kill(actor)


async def _met(meeting: Awaitable[None]) -> None:
    try:
        await meeting
    except RayActorError as error:
        # A host that is gone is introduced when it is found again; until then rows are sent to each host directly.
        log.info("a host missed who the others are: %s", str(error).splitlines()[0])


def _end_processes(hosts: Sequence[HostInfo]) -> None:
    """A process that hangs does not hear Ray's request to exit: it is killed on its node."""
    ends = [
        _end_process.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host.node, soft=False)).remote(host.pid) for host in hosts
    ]
    if ends:
        ray.wait(ends, num_returns=len(ends), timeout=_STOP_TIMEOUT_S)


@ray.remote(num_cpus=0)
def _end_process(pid: int) -> None:
    command = Path(f"/proc/{pid}/cmdline")
    if command.exists() and b"ExpertHost" in command.read_bytes():
        os.kill(pid, signal.SIGKILL)


def _name(number: int) -> str:
    return f"host-{number}"


def check_resources(placement: PlacementConfig, num_hosts: int) -> None:
    """Raises ConfigError unless the live nodes can hold so many hosts; Ray itself would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, key, each in (("CPU", "cpus_per_host", placement.cpus_per_host), ("GPU", "gpus_per_host", placement.gpus_per_host)):
        if not each:
            continue
        room = sum(int(node.get(resource, 0) / each + 1e-9) for node in nodes)
        if room < num_hosts:
            there = " + ".join(f"{node.get(resource, 0):g}" for node in nodes)
            raise ConfigError(
                f"placement.num_hosts is {num_hosts} and each takes placement.{key} = {each:g}, "
                f"but the cluster has {there} {resource}s: room for {room} hosts"
            )
