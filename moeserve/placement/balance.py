"""How even the hosts are loaded: the number that is printed, compared and improved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeserve.placement.constraints import Floats
from moeserve.placement.deal import layers_of_stage
from moeserve.placement.layer import Integers, LayerPlacement, Placement


def host_rows(layer: LayerPlacement, rows: Floats) -> Floats:
    """[D]: rows expected on each host, if the copies of each expert share its rows [E] evenly."""
    units = layer.unit_of_physical
    copies = np.bincount(units, minlength=layer.num_units)
    each = rows[units // layer.tensor_parallel] / copies[units]
    return np.bincount(layer.host_of_physical, weights=each, minlength=layer.num_hosts).astype(np.float64)


def balancedness(placement: Placement, demand: Sequence[Floats | None], stages: int = 1) -> float:
    """As `layer_balancedness`, the mean over layers."""
    return mean_balancedness(layer_balancedness(placement, demand, stages))


def mean_balancedness(layers: Sequence[float | None]) -> float:
    """Over the layers for which it is known; 1 if there are none."""
    known = [each for each in layers if each is not None]
    return float(np.mean(known)) if known else 1.0


def layer_balancedness(placement: Placement, demand: Sequence[Floats | None], stages: int = 1) -> list[float | None]:
    """For each layer, mean / max of the rows expected on its hosts: 1 = even, 1 / D = one host has everything.

    demand: rows [E] of each layer, in any unit; None, or no rows at all = not known, as is the balancedness.
    stages: placement.pipeline_stages; all hosts of its stage count for a layer, also those that hold none of its experts.
    """
    even: list[float | None] = [None] * len(placement.layers)
    for stage in range(stages):
        layers = layers_of_stage(stage, len(placement.layers), stages)
        hosts = _hosts(placement, layers)
        for layer in layers:
            rows = demand[layer]
            if rows is not None and rows.sum() > 0:
                loads = host_rows(placement.layers[layer], rows)[hosts]
                even[layer] = float(loads.mean() / loads.max())
    return even


def _hosts(placement: Placement, layers: range) -> Integers:
    return np.unique(np.concatenate([placement.layers[layer].host_of_physical for layer in layers]))
