"""Faults of hosts that are Ray actors on this machine: signals to their processes, and a call that Ray adds to every actor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from moeserve.cluster.fault_injector import poison
from moeserve.cluster.ray_fleet import RayFleet


class RayFaultInjector:
    """A `FaultInjector`, for whoever has started the actors and holds their handles. Hosts themselves know nothing of it."""

    def __init__(self, fleet: RayFleet) -> None:
        self._fleet = fleet

    def kill(self, number: int) -> None:
        """As `FaultInjector.kill`."""
        _signal(self._pid(number), signal.SIGKILL)

    def stop(self, number: int) -> Callable[[], None]:
        """As `FaultInjector.stop`."""
        pid = self._pid(number)
        _signal(pid, signal.SIGSTOP)
        return lambda: _signal(pid, signal.SIGCONT)

    def poison(self, number: int, for_s: float) -> None:
        """As `FaultInjector.poison`."""
        ray.get([actor.__ray_call__.remote(_poison, for_s) for actor in self._fleet._members[number].actors])

    def _pid(self, number: int) -> int:
        return self._fleet._directory[number].pid  # also of one that is late to answer its fleet


def _signal(pid: int, number: signal.Signals) -> None:
    """To a host's process, if it lives; never to another one that has got its number since."""
    with suppress(ProcessLookupError, FileNotFoundError):
        process = os.pidfd_open(pid)
        try:
            if b"ExpertHost" in Path(f"/proc/{pid}/cmdline").read_bytes():
                signal.pidfd_send_signal(process, number)
        finally:
            os.close(process)


def _poison(actor: Any, for_s: float) -> None:
    """In the process of an `ExpertHost`."""
    poison(actor._started, for_s)
