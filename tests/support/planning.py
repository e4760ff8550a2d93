"""The planner of a configuration, as programs make it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeserve import ServiceConfig, load_config
from moeserve.checkpoints import ReleasedLayer, ServedLayers, Swap
from moeserve.control import Planner
from moeserve.placement import Placement


def planner_of(config: ServiceConfig) -> Planner:
    is_here = config.ray.address is None
    return Planner(ServedLayers.read(config), config.placement, is_here, config.balancing, config.autoscaling)


def swapped(config: ServiceConfig | Path, swaps: Iterable[Swap]) -> list[ReleasedLayer]:
    """The layers of a configuration, or of a checkpoint folder, with these swaps made."""
    served = load_config(config) if isinstance(config, Path) else config
    return ServedLayers.read(served).swapped(list(swaps))


def renumbered(placement: Placement, numbers: Sequence[int], epoch: int) -> Placement:
    """The same placement on hosts with other numbers: host i becomes numbers[i]; numbers ascend."""
    table, num_hosts = np.array(numbers), max(numbers) + 1
    layers = (replace(layer, num_hosts=num_hosts, host_of_physical=table[layer.host_of_physical]) for layer in placement.layers)
    return Placement(epoch, num_hosts, tuple(layers))
