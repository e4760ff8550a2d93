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
    """Mean / max of the rows expected on the hosts of a layer, as a mean over layers: 1 = even, 1 / D = one host has everything.

    demand: rows [E] of each layer, in any unit; None, or no rows at all = not known, and the layer does not count.
    stages: placement.pipeline_stages; all hosts of its stage count for a layer, also those that hold none of its experts.
    """
    even = []
    for stage in range(stages):
        layers = layers_of_stage(stage, len(placement.layers), stages)
        hosts = _hosts(placement, layers)
        for layer in layers:
            rows = demand[layer]
            if rows is not None and rows.sum() > 0:
                loads = host_rows(placement.layers[layer], rows)[hosts]
                even.append(float(loads.mean() / loads.max()))
    return float(np.mean(even)) if even else 1.0


def _hosts(placement: Placement, layers: range) -> Integers:
    return np.unique(np.concatenate([placement.layers[layer].host_of_physical for layer in layers]))
