"""Logical experts (the model's) -> physical experts (one copy on one host) -> hosts.

E logical experts, P physical experts (P = E while every expert has one copy), D hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moeserve.config import LayerSpec, PlacementConfig
from moeserve.errors import ConfigError

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class LayerPlacement:
    """One layer's physical experts, numbered host by host; immutable.

    logical_of_physical [P]: which expert each is a copy of
    host_of_physical    [P], ascending: the host it lives on
    """

    num_hosts: int
    logical_of_physical: Integers
    host_of_physical: Integers

    @cached_property
    def slot_of_physical(self) -> Integers:
        """[P] int32: index among the experts of its host."""
        first = np.searchsorted(self.host_of_physical, self.host_of_physical)
        return (np.arange(len(self.host_of_physical)) - first).astype(np.int32)

    @cached_property
    def physical_of_logical(self) -> Integers:
        """[E], of the narrowest type, because NumPy sorts numbers of up to 16 bits by radix: the copy that serves each expert."""
        return self.logical_of_physical.argsort().astype(np.min_scalar_type(len(self.logical_of_physical)))

    def experts_on(self, host: int) -> list[int]:
        """Logical ids of the experts `host` holds, in slot order."""
        held: list[int] = self.logical_of_physical[self.host_of_physical == host].tolist()
        return held


@dataclass(frozen=True, eq=False)
class Placement:
    """All layers at one moment; a change is a new placement with a higher epoch."""

    epoch: int
    num_hosts: int
    layers: tuple[LayerPlacement, ...]


def plan_placement(specs: Sequence[LayerSpec], config: PlacementConfig, epoch: int = 1) -> Placement:
    """Spread every layer's experts over the hosts as evenly as numbers allow.

    Raises ConfigError when a host would be left without any expert.
    """
    most = max(spec.num_experts for spec in specs)
    if config.num_hosts > most:
        raise ConfigError(f"placement.num_hosts is {config.num_hosts}, but no layer has more than {most} experts to share out")
    return Placement(epoch, config.num_hosts, tuple(_plan_layer(layer, spec.num_experts, config) for layer, spec in enumerate(specs)))


def _plan_layer(layer: int, num_experts: int, config: PlacementConfig) -> LayerPlacement:
    experts = np.arange(num_experts)
    if config.strategy == "round_robin":
        host_of_logical = experts % config.num_hosts
    else:
        host_of_logical = experts * config.num_hosts // num_experts
    # Each layer starts at another host, or the first ones would get every odd expert.
    host_of_logical = (host_of_logical + layer) % config.num_hosts
    logical_of_physical = host_of_logical.argsort(kind="stable")
    return LayerPlacement(config.num_hosts, logical_of_physical, host_of_logical[logical_of_physical])
