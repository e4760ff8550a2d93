"""Hosts as threads of this process: no Ray, ready at once, no pinned cores, no isolation of faults.

For notebooks, tests, and a single machine.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from pathlib import Path
from typing import Final

import torch

from moeserve.addresses import join
from moeserve.cluster.cluster import Loss, MemoryStore
from moeserve.cluster.folders import Hold, hold_new, remove_all_abandoned
from moeserve.cluster.thread_fleet import ThreadFleet
from moeserve.config import PlacementConfig, RayConfig, ServedModel
from moeserve.control import Node, Wanted
from moeserve.errors import ConfigError
from moeserve.host import Holdings, Where
from moeserve.loops import in_thread
from moeserve.observe.stats import host_name

log = logging.getLogger(__name__)

_NODE = "this-process"
_LONGEST_SOCKET: Final = "host-99999-9999999.sock"


class ThreadNodes:
    """One node, with as many CPUs as a local Ray would say it has."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus, self.gpus = cpus, gpus

    async def list(self) -> list[Node]:
        """This process alone."""
        room = {"CPU": float(self.cpus), "GPU": float(self.gpus)}
        return [Node(_NODE, _NODE, room, room)]

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        """Does nothing: there is no autoscaler."""


class ThreadCluster:
    """A `Cluster` that is this process."""

    intent = "starting hosts as threads of this process"
    is_private = True
    here = _NODE

    def __init__(self, model: ServedModel, placing: PlacementConfig, ray: RayConfig) -> None:
        hosts = 0 if placing.num_hosts == "all" else placing.num_hosts
        cpus = ray.num_cpus or max(os.cpu_count() or 1, math.ceil(hosts * placing.cpus_per_host))
        self._model, self._placing, self._temp_dir = model, placing, ray.temp_dir
        self._service_id, self._is_followed = "", False
        self._sockets: Hold | None = None
        self.nodes = ThreadNodes(cpus, torch.cuda.device_count() if ray.num_gpus is None else ray.num_gpus)
        self.hosts = ThreadFleet(self.where, self._hold)
        self.store = MemoryStore()

    async def start(self) -> None:
        """Makes a place for sockets, by which other programs of this user may reach hosts."""
        try:
            self._sockets = await in_thread(_place_for_sockets, self._temp_dir)
        except ConfigError as error:
            log.warning("only this process reaches its hosts: %s", error)

    def open(self, service_id: str, *, is_followed: bool) -> None:
        """As `Cluster.open`."""
        self._service_id, self._is_followed = service_id, is_followed

    async def lost(self) -> Loss:
        """Waits forever."""
        await asyncio.Event().wait()
        raise AssertionError("it is never set")

    async def stop(self) -> None:
        """Removes that place. The owner of the hosts stops them."""
        if self._sockets is not None:
            self._sockets.let_go()

    def where(self, number: int, incarnation: int) -> Where:
        """Reachable through memory in this process and in others of this user, and over TCP from any on this machine."""
        name = f"{host_name(number)}-{incarnation}"
        endpoints = [f"local:{self._service_id}/{name}"]
        if self._sockets is not None:
            endpoints.append(f"unix:{self._sockets.path / name}.sock")
        if self._is_followed:
            endpoints.append(f"tcp://{join('127.0.0.1', 0)}")
        gpus = torch.cuda.device_count() if self._placing.gpus_per_host else 0
        device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
        return Where(_NODE, tuple(endpoints), device, max(1, int(self._placing.cpus_per_host)))

    def _hold(self, number: int, where: Where) -> Holdings:
        return Holdings(self._model, number, where.device, self._placing.memory_per_host_bytes)


def _place_for_sockets(chosen: Path | None) -> Hold:
    remove_all_abandoned(chosen)
    return hold_new(_LONGEST_SOCKET, chosen)
