"""Faults of hosts that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from moeserve.cluster.fault_injector import poison
from moeserve.cluster.thread_fleet import ThreadFleet


class ThreadFaultInjector:
    """A `FaultInjector`. A thread cannot be cut off in the middle of a pass: it is killed or stopped when the pass is over."""

    def __init__(self, fleet: ThreadFleet) -> None:
        self._fleet = fleet

    def kill(self, number: int) -> None:
        """As `FaultInjector.kill`."""
        self._fleet.members[number].kill()

    def stop(self, number: int) -> Callable[[], None]:
        """As `FaultInjector.stop`."""
        resumed = threading.Event()
        self._fleet.members[number].host.hold(resumed)
        return resumed.set

    def poison(self, number: int, for_s: float) -> None:
        """As `FaultInjector.poison`."""
        poison(self._fleet.members[number].host, for_s)
