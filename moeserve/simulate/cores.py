"""The cores of imagined nodes, and who computes on them when.

D hosts.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from moeserve.bench.trace import Rows
from moeserve.placement.layer import Integers


class Cores:
    """`node_of`: the node of each host, by its number; `per_node`: cores of each, None = every host and every frontend has its own.

    Frontends, and callers beside them, are on the nodes in turn.
    """

    def __init__(self, node_of: Mapping[int, str], per_node: int | None) -> None:
        self._node_of = node_of
        nodes = [] if per_node is None else list(dict.fromkeys(node_of.values()))
        #: of each node, when its cores are free
        self._free_s = {node: [0.0] * (per_node or 0) for node in nodes}
        self._nodes = nodes

    def take(self, frontend: int, start: float, seconds: float) -> float:
        """What a frontend does ends then: it does not wait for passes, which get that much less of a core."""
        if self._nodes:
            free = self._free_s[self._nodes[frontend % len(self._nodes)]]
            heapq.heapreplace(free, max(free[0], start) + seconds)
        return start + seconds

    def passes(self, start: float, hosts: Integers, seconds: Rows, host_s: Rows) -> Rows:
        """When passes of `seconds` on these hosts end, which begin when each host is free, by `host_s` [D], and has a core."""
        ready = np.maximum(start, host_s[hosts])
        if not self._nodes:
            return ready + seconds
        ends = np.empty(len(hosts))
        for index in ready.argsort(kind="stable").tolist():
            free = self._free_s[self._node_of[int(hosts[index])]]
            ends[index] = max(free[0], ready[index]) + seconds[index]
            heapq.heapreplace(free, float(ends[index]))
        return ends
