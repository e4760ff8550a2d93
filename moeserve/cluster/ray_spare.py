"""A spare process on a node: it has imported what hosts need, and Ray makes it the next host that starts there, in place of a new one.

It belongs to Ray's pool of idle workers: it has no place, no CPU and no GPU, and ends with its raylet. Ray ends what is idle beyond one.
Only a Ray that was started with `SETTINGS` has spares.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Final

from moeserve.cluster.ray_internals import prestart_worker
from moeserve.cluster.timing import SPARE_DELAY_S
from moeserve.errors import MoEServeError
from moeserve.log_limit import limited_logger
from moeserve.loops import in_thread
from moeserve.observe.stats import HostInfo

strangers = limited_logger(__name__)

#: environment of Ray's processes, which hand it on to the processes of programs and hosts
SETTINGS: Final[Mapping[str, str]] = {
    "RAY_preload_python_modules": "moeserve.cluster.ray_expert_host",
    "RAY_num_workers_soft_limit": "1",
    # those that Ray starts first wait for the first hosts, which the service takes some seconds to ask for
    "RAY_idle_worker_killing_time_threshold_ms": "10000",
}


def are_kept() -> bool:
    """Whether the Ray of this process was started so that it has them."""
    return SETTINGS.items() <= os.environ.items()


class Spares:
    """Sees to it that nodes with hosts have one, where spares are kept; Ray ends what is idle there beyond one."""

    def __init__(self) -> None:
        #: hosts as they were when a spare was asked for: whatever has started since may have been the one before
        self._known: dict[int, HostInfo] = {}
        self._asking: set[str] = set()

    async def renew(self, number: int, info: HostInfo) -> None:
        """A host is what it says of itself: if it has just started, its node gets another spare."""
        known, self._known[number] = self._known.get(number), info
        if not are_kept() or (known is not None and known.pid == info.pid) or info.node in self._asking:
            return
        self._asking.add(info.node)
        try:
            await asyncio.sleep(SPARE_DELAY_S)
        finally:
            self._asking.discard(info.node)
        try:
            await in_thread(prestart_worker, info.node)
        except MoEServeError as error:
            strangers.warning("hosts that end come back seconds later than they could: %s", error, extra={"kind": info.node})
