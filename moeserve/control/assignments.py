"""Nodes of the cluster, and which host is on which node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Node:
    """A live node.

    `total` and `free` are amounts of "CPU" and "GPU"; `free` is all that others do not use: what hosts of this service have there
    counts as free, because assignments say where they are. `is_leaving`: it takes nothing new, and what is there should go elsewhere.
    """

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    is_leaving: bool = False


@dataclass(frozen=True)
class Assignment:
    """Host number `number` is, or shall be, on the node `node` (its id)."""

    number: int
    node: str


@dataclass(frozen=True)
class Wanted:
    """How many hosts there shall be ("all" = as many as the nodes hold), what each takes, and where it may be.

    `least` and `most`: how many hosts can hold the experts at all, by memory and by number.
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
    """The hosts that should run next, by number; `shortage` says in one sentence what part of the desired state does not fit, if any."""

    assignments: tuple[Assignment, ...]
    shortage: str | None = None
