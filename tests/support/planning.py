"""The planner of a configuration, as programs make it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moeserve import ServiceConfig, load_config
from moeserve.checkpoints import ReleasedLayer, ServedLayers, Swap
from moeserve.control import Planner


def planner_of(config: ServiceConfig) -> Planner:
    return Planner(ServedLayers.read(config), config.placement, on_this_machine=config.ray.address is None)


def swapped(config: ServiceConfig | Path, swaps: Iterable[Swap]) -> list[ReleasedLayer]:
    """The layers of a configuration, or of a checkpoint folder, with these swaps made."""
    served = load_config(config) if isinstance(config, Path) else config
    return ServedLayers.read(served).swapped(list(swaps))
