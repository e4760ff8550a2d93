"""What each kind of fault does to a host of a running service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from moeserve.bench.chaos_schedule import FaultKind
from moeserve.cluster.fault_injector import FaultInjector
from moeserve.config.values import NumHosts
from moeserve.control.controller import Controller
from moeserve.observe.stats import host_name

#: a slow host stands still for so long, again and again: a fifth of its time
_STUMBLE_S: Final = 0.05
_STRIDE_S: Final = 0.2


@dataclass(frozen=True)
class Breaking:
    """How hosts are broken; a fault that passes lasts `lasting_s`, and after one that is removed there are `num_hosts` again."""

    injector: FaultInjector
    controller: Controller
    num_hosts: NumHosts
    lasting_s: float

    async def carry_out(self, kind: FaultKind, host: int) -> None:
        """Returns when the fault is over; the host may not have recovered from it by then."""
        await _FAULTS[kind](self, host)

    async def _kill(self, host: int) -> None:
        await asyncio.to_thread(self.injector.kill, host)

    async def _stop(self, host: int) -> None:
        await self._stop_for(host, self.lasting_s)

    async def _slow(self, host: int) -> None:
        end = time.monotonic() + self.lasting_s
        while time.monotonic() < end:
            await self._stop_for(host, _STUMBLE_S)
            await asyncio.sleep(_STRIDE_S)

    async def _nan(self, host: int) -> None:
        await asyncio.to_thread(self.injector.poison, host, self.lasting_s)
        await asyncio.sleep(self.lasting_s)

    async def _leave(self, host: int) -> None:
        await self.controller.drain(host_name(host))
        await self.controller.scale(self.num_hosts)

    async def _stop_for(self, host: int, seconds: float) -> None:
        resume = self.injector.stop(host)
        try:
            await asyncio.sleep(seconds)
        finally:
            resume()


_FAULTS: Final[Mapping[FaultKind, Callable[[Breaking, int], Awaitable[None]]]] = {
    "kill": Breaking._kill,
    "stop": Breaking._stop,
    "slow": Breaking._slow,
    "nan": Breaking._nan,
    "leave": Breaking._leave,
}
