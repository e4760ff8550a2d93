"""Balancedness of hosts, and the stages that layers are placed on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeserve import load_config
from moeserve.checkpoints import host_bytes, layer_size, layer_sources
from moeserve.placement import LayerPlacement, Placement, balancedness, host_rows, plan
from tests.placement.clusters import constraints_on, hosts_of, pairs, sizes_of


def placed(*layers: list[list[int]]) -> Placement:
    """For each layer the hosts of each expert."""
    made = []
    for hosts in layers:
        units = np.repeat(np.arange(len(hosts)), [len(each) for each in hosts])
        made.append(LayerPlacement.of(6, units, np.concatenate(hosts)))
    return Placement(1, 6, tuple(made))


def test_balancedness_is_mean_by_max_of_the_rows_of_hosts_as_a_mean_over_layers() -> None:
    placement = placed([[0], [0, 1], [1]], [[0], [0], [0]])
    rows = np.array([10.0, 20, 30])
    assert host_rows(placement.layers[0], rows).tolist() == [20, 40, 0, 0, 0, 0]
    assert balancedness(placement, [rows, rows]) == pytest.approx((30 / 40 + 30 / 60) / 2)
    # Layers without known rows do not count, and numbers without a host are none.
    assert balancedness(placement, [rows, None]) == balancedness(placement, [rows, rows * 0]) == 30 / 40
    assert balancedness(placement, [None, None]) == 1


def test_hosts_of_other_stages_do_not_count() -> None:
    placement = placed([[0], [2]], [[3], [5]])
    rows = np.ones(2)
    assert balancedness(placement, [rows, rows]) == 0.5
    assert balancedness(placement, [rows, rows], stages=2) == 1


def test_hosts_stay_in_their_stage() -> None:
    sizes = sizes_of(4, 12)
    limits = replace(constraints_on(sizes, hosts_of(*range(6))), pipeline_stages=2)
    before = plan(sizes, limits)
    assert [set(layer.host_of_physical.tolist()) for layer in before.layers] == [{0, 1, 2}] * 2 + [{3, 4, 5}] * 2
    fewer = plan(sizes, replace(limits, hosts=(*limits.hosts[:4], limits.hosts[5])), None, before)
    assert {pair for pair in pairs(before) if pair[2] != 4} <= pairs(fewer)
    more = plan(sizes, replace(limits, hosts=(*limits.hosts[:4], *hosts_of(5, 7))), None, fewer)
    assert [set(layer.host_of_physical.tolist()) for layer in more.layers] == [{0, 1, 2}] * 2 + [{3, 5, 7}] * 2


@pytest.mark.parametrize("tensor_parallel", [1, 3])
def test_sizes_of_layers_are_those_that_hosts_will_hold(tensor_parallel: int) -> None:
    layer = {"hidden_size": 8, "intermediate_size": 20, "num_experts": 6, "shared_expert": {"intermediate_size": 4}}
    sources = layer_sources(load_config({"layers": [layer, {**layer, "num_experts": 4}]}))
    sizes = [layer_size(source, tensor_parallel) for source in sources]
    placement = plan(sizes, constraints_on(sizes, hosts_of(0, 1, 2), tensor_parallel=tensor_parallel))
    held = [0, 0, 0]
    for size, placed_layer in zip(sizes, placement.layers, strict=True):
        for unit, host in zip(placed_layer.unit_of_physical, placed_layer.host_of_physical, strict=True):
            held[host] += int(size.unit_bytes[unit])
        for host in set(placed_layer.host_of_physical.tolist()):
            held[host] += size.shared_bytes
    assert held == host_bytes(sources, placement)
