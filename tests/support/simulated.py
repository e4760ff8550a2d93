"""Nodes and hosts that a test moves about, for a real controller: no process, no socket, no weights read."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from moeserve.control import Assignment, Node, Wanted
from moeserve.control.follow import Report
from moeserve.control.frontends import Frontends
from moeserve.control.record import packed_counts
from moeserve.errors import ConfigError
from moeserve.observe.stats import HostInfo, PassTime, host_name
from moeserve.release import Release


class SimulatedNodes:
    """`cpus` of each node that lives, by name."""

    def __init__(self, cpus: Mapping[str, int]) -> None:
        self.cpus = dict(cpus)
        self.leaving: set[str] = set()

    async def list(self) -> list[Node]:
        return [Node(name, name, {"CPU": cpus}, {"CPU": cpus}, is_leaving=name in self.leaving) for name, cpus in self.cpus.items()]

    def ask_for(self, wanted: Wanted, num_hosts: int) -> None:
        pass


class SimulatedHosts:
    """What each host holds: its releases, by epoch. `refuses`: the next release cannot be loaded."""

    def __init__(self) -> None:
        self.held: dict[int, dict[int, Release]] = {}
        self.down: set[int] = set()
        self.refuses = False
        self.given_up: Collection[int] = set()
        self.failing: Mapping[int, str] = {}
        self.loading: Mapping[int, int] = {}
        self.pass_times: Mapping[int, PassTime] = {}

    @property
    def present(self) -> dict[int, HostInfo]:
        return {number: HostInfo(host_name(number), ()) for number in self.held if number not in self.down}

    async def take(self, release: Release, assignments: Sequence[Assignment]) -> None:
        for number in (assignment.number for assignment in assignments):
            self.held.setdefault(number, {})[release.epoch] = release
        if self.refuses:
            self.refuses = False
            raise ConfigError("the disk is full")

    async def withdraw(self, epoch: int) -> None:
        self.held = {number: {of: release for of, release in held.items() if of < epoch} for number, held in self.held.items()}

    async def retire(self, epoch: int) -> None:
        self.held = {number: {of: release for of, release in held.items() if of >= epoch} for number, held in self.held.items()}

    async def remove(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.held.pop(number, None)
            self.down.discard(number)


class SimulatedFrontend:
    """Follows as a frontend does, and counts what callers ask. `epochs`: of every release it was told to use."""

    def __init__(self, frontends: Frontends, num_experts: Sequence[int]) -> None:
        self._frontends = frontends
        self.requested = [np.zeros(number, dtype=np.int64) for number in num_experts]
        self.epochs: list[int] = []

    async def start(self) -> None:
        self._member = await self._frontends.join(Report("simulated"))
        self._following = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        self._following.cancel()
        await asyncio.wait([self._following])

    def asked(self, layer: int, rows: np.ndarray) -> None:
        self.requested[layer] += rows
        self._tell(self._member.report.epoch, self._member.report.tried_epoch)

    async def _follow(self) -> None:
        async for order in self._frontends.orders(self._member):
            if order.current is not None and (not self.epochs or order.current.epoch != self.epochs[-1]):
                self.epochs.append(order.current.epoch)
            self._tell(self.epochs[-1] if self.epochs else 0, 0 if order.candidate is None else order.candidate.epoch)

    def _tell(self, epoch: int, tried: int) -> None:
        report = Report("simulated", epoch=epoch, oldest_epoch=epoch, tried_epoch=tried, requested=packed_counts(self.requested))
        self._frontends.hear(self._member, report)
