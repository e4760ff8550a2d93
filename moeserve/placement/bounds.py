"""The least and the largest number of hosts that the experts can be placed on: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moeserve.config import LayerSpec, PlacementConfig
from moeserve.errors import ConfigError
from moeserve.placement.deal import check_names, check_split, copies_of, plan_placement

_MOST_LOOKED_AT: Final = 1024


def fewest_hosts(specs: Sequence[LayerSpec], config: PlacementConfig) -> int:
    """Copies and shards need hosts of their own in each stage, and placement.experts_per_host may ask for more."""
    check_split(specs, config)
    check_names(specs, config)
    copies = [copies_of(spec, config) for spec in specs]
    apart = max(config.tensor_parallel, *(int(each.max()) for each in copies))
    largest = max(int(each.sum()) * config.tensor_parallel for each in copies)
    by_number = -(-largest // config.experts_per_host) if config.experts_per_host is not None else 1
    return max(apart, by_number) * config.pipeline_stages


def most_hosts(specs: Sequence[LayerSpec], config: PlacementConfig) -> int:
    """The largest number of hosts with an expert on each, also for every smaller allowed number; searched up to 1024."""
    stages = config.pipeline_stages
    layers_of = [[spec for number, spec in enumerate(specs) if number * stages // len(specs) == stage] for stage in range(stages)]
    # Every expert begins on another host, so that many hosts are never idle; with copies and shards there may be more.
    never_idle = stages * min(max((spec.num_hosted_experts for spec in layers), default=0) for layers in layers_of)
    most = max(never_idle, fewest_hosts(specs, config) - 1)
    units = [[int(copies_of(spec, config).sum()) * config.tensor_parallel for spec in layers] for layers in layers_of]
    limit = min(stages * (min(sum(each) for each in units) + 1), _MOST_LOOKED_AT)
    while most < limit and _is_possible(specs, config, most + 1):
        most += 1
    return most


def _is_possible(specs: Sequence[LayerSpec], config: PlacementConfig, num_hosts: int) -> bool:
    try:
        plan_placement(specs, config.model_copy(update={"num_hosts": num_hosts, "experts_per_host": None}))
    except ConfigError:
        return False
    return True
