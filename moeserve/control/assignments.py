"""Nodes of the cluster, and which host is on which node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Node:
    """A live node.

    `total` and `free` are amounts of "CPU" and "GPU"; `free` is what others do not use: resources of hosts of this service
    count as free, because assignments say where they are. `is_leaving`: it accepts no hosts, and its hosts should move.
    """

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    is_leaving: bool = False


@dataclass(frozen=True)
class Assignment:
    """Host `number` is, or should be, on the node with the id `node`."""

    number: int
    node: str


@dataclass(frozen=True)
class Wanted:
    """The desired number of hosts ("all" = as many as fit on the nodes), the resources of each, and the allowed nodes.

    `least` and `most`: bounds on the number of hosts that can hold the experts, by memory and by number.
    """

    num_hosts: int | Literal["all"]
    cpus: float = 1
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    strategy: Literal["spread", "pack", "strict_spread"] = "spread"
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Assigned:
    """The hosts that should run next, by number; `shortage` says in one sentence which part of the desired state does not fit.

    missing: so many of the desired hosts have no room
    """

    assignments: tuple[Assignment, ...]
    shortage: str | None = None
    missing: int = 0
