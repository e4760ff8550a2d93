"""A service of its own, under load, with faults on a schedule."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moeserve.bench.chaos_faults import Breaking
from moeserve.bench.chaos_findings import Findings, Injected, Phase
from moeserve.bench.chaos_load import LoadProcess
from moeserve.bench.chaos_schedule import FaultKind, schedule
from moeserve.config import ServiceConfig
from moeserve.observe.stats import HostStats
from moeserve.programs.clusters import cluster_of, fault_injector_of
from moeserve.programs.serve import Service

#: a fault that passes lasts this share of the time between two, and so long at most
_LASTING: Final = 2 / 3
_MOST_LASTING_S: Final = 3.0
#: for a host to come back
_PATIENCE_S: Final = 60.0
_LOOK_S: Final = 0.02

#: receives one line about what begins
Tell = Callable[[str], None]


@dataclass(frozen=True)
class ChaosPlan:
    """Which faults, one every `every_s` for `for_s`, or until each kind has come once, under how many clients.

    The same seed gives the same faults and requests.
    """

    kinds: Sequence[FaultKind]
    every_s: float
    for_s: float
    clients: int
    seed: int

    @property
    def total_s(self) -> float:
        """How long clients call, if hosts come back in time."""
        return self.for_s + 2 * self.every_s


async def run(config: ServiceConfig, plan: ChaosPlan, tell: Tell, watch: Callable[[LoadProcess], None] = lambda _: None) -> Findings:
    """Starts the service, loads it, breaks it, and ends it; `watch` receives the load when it begins.

    Raises ConfigError or another MoEServeError when the service cannot start, or a fault cannot be injected.
    """
    load = LoadProcess(config, plan.clients, plan.seed)
    try:
        cluster = cluster_of(config)
        service = Service(config, progress=tell, cluster=cluster)
        await service.start()
        try:
            await load.ready()
            load.begin(service.target)
            watch(load)
            lasting_s = min(_LASTING * plan.every_s, _MOST_LASTING_S)
            breaking = Breaking(fault_injector_of(config, cluster), service.controller, config.placement.num_hosts, lasting_s)
            return await _Run(service, load, breaking, tell).through(plan)
        finally:
            load.kill()  # otherwise the end of the service waits for calls
            await service.stop()
    finally:
        load.kill()


class _Run:
    def __init__(self, service: Service, load: LoadProcess, breaking: Breaking, tell: Tell) -> None:
        self._service, self._load, self._breaking, self._tell = service, load, breaking, tell
        self._num_hosts = len(self._hosts())
        self._faults: list[Injected] = []

    async def through(self, plan: ChaosPlan) -> Findings:
        """Before, during and after the faults."""
        await _until(lambda: bool(self._load.outcomes))
        self._tell(f"{plan.every_s:g} s without faults")
        phases = {"before": await _pass(plan.every_s)}
        phases["during"] = await self._break(plan)
        is_whole = await self._recover()
        self._tell(f"every host is back; {plan.every_s:g} s without faults" if is_whole else f"not every host is back in {_PATIENCE_S:g} s")
        phases["after"] = await _pass(plan.every_s)
        await self._load.stop()
        is_whole = is_whole and await self._recover()  # on a machine that is busy, a host may be out at this very moment
        return Findings(self._load.calls, plan.kinds, self._faults, phases, is_whole, self._load.longest_lag_s)

    async def _break(self, plan: ChaosPlan) -> Phase:
        """One fault after the other; the next one waits until every host has recovered from those before."""
        begin = time.monotonic()
        for fault in schedule(plan.kinds, plan.seed):
            is_enough = len(self._faults) >= len(plan.kinds) and time.monotonic() >= begin + plan.for_s
            if is_enough or not await self._recover():
                break
            hosts = self._hosts()
            host = hosts[fault.victim % len(hosts)]
            self._tell(f"{time.monotonic() - begin:5.1f} s: {fault.kind} {host.name}")
            self._faults.append(Injected(fault.kind, time.monotonic()))
            due = time.monotonic() + plan.every_s
            await self._breaking.carry_out(fault.kind, host.number)
            await asyncio.sleep(due - time.monotonic())
        return Phase(begin, time.monotonic())

    async def _recover(self) -> bool:
        """Waits until every host gets rows; false = it takes too long."""
        return await _until(self._is_whole)

    def _is_whole(self) -> bool:
        hosts = self._hosts()
        return len(hosts) == self._num_hosts and all(host.state in ("up", "slow") for host in hosts)

    def _hosts(self) -> list[HostStats]:
        return sorted(self._service.frontend.frontend.stats().hosts, key=lambda host: host.number)


async def _until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if holds():
            return True
        await asyncio.sleep(_LOOK_S)
    return holds()


async def _pass(seconds: float) -> Phase:
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    return Phase(begin, time.monotonic())
