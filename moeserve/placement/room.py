"""The hosts of a stage while a plan is made: what each holds of all layers, and how much more it could."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from moeserve.placement.constraints import HostLimits
from moeserve.placement.layer import Integers

_UNBOUNDED: Final = 2**62


class Room:
    """D hosts, called 0..D-1 here.

    numbers [D]: by which the service knows them
    nodes   [D]: which node each is on
    memory  [D], used [D]: bytes; held [D]: physical experts
    """

    def __init__(self, hosts: Sequence[HostLimits]) -> None:
        self.numbers = np.array([host.number for host in hosts])
        self.nodes: Integers = np.unique([host.node for host in hosts], return_inverse=True)[1]
        self.num_nodes = int(self.nodes.max()) + 1
        self.memory = np.array([_UNBOUNDED if host.memory_bytes is None else host.memory_bytes for host in hosts], dtype=np.int64)
        self.is_bounded = any(host.memory_bytes is not None for host in hosts)
        self.used = np.zeros(len(hosts), dtype=np.int64)
        self.held = np.zeros(len(hosts), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def saved(self) -> tuple[Integers, Integers]:
        """What is held now, for `restore`."""
        return self.used.copy(), self.held.copy()

    def restore(self, saved: tuple[Integers, Integers]) -> None:
        """Back to that."""
        self.used[:], self.held[:] = saved
