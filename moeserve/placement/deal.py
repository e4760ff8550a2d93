"""The first placement, before any load is known: experts are dealt out to hosts as evenly as numbers allow.

E experts of a layer, M shards each, C copies, D hosts, S pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.config import MAX_PHYSICAL, LayerSpec, PlacementConfig, Strategy
from moeserve.errors import ConfigError, number_of
from moeserve.placement.layer import Booleans, Integers, LayerPlacement, Placement


def plan_placement(specs: Sequence[LayerSpec], config: PlacementConfig, epoch: int = 1) -> Placement:
    """Spread every layer's experts over the hosts of its stage as evenly as numbers allow.

    Copies of an expert, and shards of a copy, stand on different hosts. Raises ConfigError when that is impossible, or when a host would be
    left without any expert.
    """
    check_split(specs, config)
    check_names(specs, config)
    num_hosts = _num_hosts(specs, config)
    _check_number(specs, config, num_hosts)
    check_stages(num_hosts, len(specs), config.pipeline_stages)
    stages = [range(*stage_bounds(stage, num_hosts, config.pipeline_stages)) for stage in range(config.pipeline_stages)]
    copies = [copies_of(spec, config) for spec in specs]
    layers = []
    for number, spec in enumerate(specs):
        hosts = stages[number * config.pipeline_stages // len(specs)]
        check_apart(spec.name, int(copies[number].max()), config.tensor_parallel, len(hosts))
        units, places = deal(number, copies[number], Hands(len(hosts), config.tensor_parallel, config.strategy))
        layers.append(LayerPlacement.of(num_hosts, units, places + hosts.start, config.tensor_parallel))
    placement = Placement(epoch, num_hosts, tuple(layers))
    check_idle(num_hosts, num_hosts - len(placement.hosts))
    return placement


def check_idle(num_hosts: int, num_idle: int) -> None:
    """Raises ConfigError if hosts would be left without any expert."""
    if num_idle:
        raise ConfigError(
            f"placement.num_hosts is {num_hosts}, but no layer has enough experts for that many: {num_idle} of them would have none"
        )


def check_split(specs: Sequence[LayerSpec], config: PlacementConfig) -> None:
    """Raises ConfigError if experts cannot be split as configured."""
    for spec in specs if config.tensor_parallel > 1 else ():
        if spec.module is not None:
            raise ConfigError(f"placement.tensor_parallel must be 1: the experts of layer {spec.name} are modules, which cannot be split")


def check_names(specs: Sequence[LayerSpec], config: PlacementConfig) -> None:
    """Raises ConfigError if placement.copies names a layer that is not served."""
    names = [spec.name for spec in specs]
    unknown = sorted(set(config.copies) - {"default", *names}) if isinstance(config.copies, dict) else []
    if unknown:
        served = names[0] if len(names) == 1 else f"{len(names)} layers, from {names[0]} to {names[-1]}"
        raise ConfigError(f"placement.copies names layer {unknown[0]!r}, which is not served; served: {served}")


def _num_hosts(specs: Sequence[LayerSpec], config: PlacementConfig) -> int:
    if config.num_hosts == "all":
        raise ConfigError("placement.num_hosts is 'all', which the nodes of a cluster decide: give a number to plan with")
    if config.experts_per_host is None:
        return config.num_hosts
    largest = max(int(copies_of(spec, config).sum()) * config.tensor_parallel for spec in specs)
    needed = -(-largest // config.experts_per_host) * config.pipeline_stages
    if "num_hosts" not in config.model_fields_set:
        return needed
    if config.num_hosts < needed:
        raise ConfigError(
            f"placement.num_hosts is {config.num_hosts}, but placement.experts_per_host = {config.experts_per_host} "
            f"needs {number_of(needed, 'host')} for {largest} physical experts of a layer"
        )
    return config.num_hosts


def _check_number(specs: Sequence[LayerSpec], config: PlacementConfig, num_hosts: int) -> None:
    """Checked before arrays with an entry for each are allocated."""
    physical = sum(int(copies_of(spec, config).sum()) * config.tensor_parallel for spec in specs)
    if num_hosts > physical:
        raise ConfigError(
            f"placement.num_hosts is {num_hosts}; allowed: at most {physical}, the number of physical experts, as every host holds one"
        )
    if physical > MAX_PHYSICAL:
        raise ConfigError(
            f"placement.copies and placement.tensor_parallel make {physical} physical experts of those of {len(specs)} layers; "
            f"allowed: at most {MAX_PHYSICAL}"
        )


def check_stages(num_hosts: int, num_layers: int, stages: int) -> None:
    """Raises ConfigError unless every stage gets a layer and a host."""
    if stages > min(num_hosts, num_layers):
        raise ConfigError(
            f"placement.pipeline_stages is {stages}; allowed: at most the number of layers, {num_layers}, and of hosts, {num_hosts}"
        )


def stage_bounds(stage: int, num_hosts: int, stages: int) -> tuple[int, int]:
    """Disjoint groups of hosts, one per stage: layers are placed on them in order (Huang et al. 2019, GPipe, arXiv 1811.06965)."""
    return stage * num_hosts // stages, (stage + 1) * num_hosts // stages


def layers_of_stage(stage: int, num_layers: int, stages: int) -> range:
    """The layers that are placed on the hosts of a stage."""
    return range(-(-stage * num_layers // stages), -(-(stage + 1) * num_layers // stages))


def copies_of(spec: LayerSpec, config: PlacementConfig) -> Integers:
    """[E]: how many copies each expert of this layer gets."""
    return _configured(spec, config)[0]


def pinned_copies(spec: LayerSpec, config: PlacementConfig) -> Booleans:
    """[E]: whose copies the configuration names by layer, or by layer and expert; load does not change their number."""
    return _configured(spec, config)[1]


def _configured(spec: LayerSpec, config: PlacementConfig) -> tuple[Integers, Booleans]:
    num_experts = spec.num_hosted_experts
    is_named = isinstance(config.copies, dict) and spec.name in config.copies
    wanted = config.copies.get(spec.name, config.copies.get("default", 1)) if isinstance(config.copies, dict) else config.copies
    if isinstance(wanted, int):
        return np.full(num_experts, wanted), np.full(num_experts, is_named)
    unknown = [key for key in wanted if key != "default" and not (re.fullmatch("[0-9]{1,6}", key) and int(key) in range(num_experts))]
    if unknown:
        raise ConfigError(f"placement.copies names expert {unknown[0]!r} of layer {spec.name}; it has experts 0..{num_experts - 1}")
    copies, pinned = np.full(num_experts, wanted.get("default", 1)), np.zeros(num_experts, dtype=bool)
    named = {int(expert): number for expert, number in wanted.items() if expert != "default"}
    copies[list(named)], pinned[list(named)] = list(named.values()), True
    return copies, pinned


def check_apart(layer: str, copies: int, shards: int, num_hosts: int) -> None:
    """Raises ConfigError if copies of an expert, or shards of a copy, could not stand on different hosts."""
    for key, number in (("copies", copies), ("tensor_parallel", shards)):
        if number > num_hosts:
            raise ConfigError(
                f"placement.{key} is {number} for layer {layer}, which has {number_of(num_hosts, 'host')}; allowed: at most one per host"
            )


@dataclass(frozen=True)
class Hands:
    """Who is dealt to: hosts 0..width-1, each expert in so many shards; which experts share a host."""

    width: int
    shards: int
    strategy: Strategy


def deal(layer: int, copies: Integers, hands: Hands) -> tuple[Integers, Integers]:
    """The unit and the host of every physical expert of a layer; copies [E].

    The strategy places the copies that every expert has; further ones go to the hosts with the fewest experts.
    """
    num_experts, shards, width = len(copies), hands.shards, hands.width
    experts = np.arange(num_experts)
    start = experts % width if hands.strategy == "round_robin" else experts * width // num_experts
    # Each layer starts at another host, or the first ones would get every odd expert.
    start = start + layer
    everyone = int(copies.min())
    stride = shards if everyone * shards <= width else 1
    copy, shard = np.arange(everyone), np.arange(shards)
    place = (start[:, None, None] + shard[None, :, None] + stride * copy[None, None, :]) % width
    units = np.broadcast_to((experts[:, None] * shards + shard[None, :])[:, :, None], place.shape)
    return _with_extras(units.reshape(-1), place.reshape(-1), copies - everyone, shards, width)


def _with_extras(units: Integers, places: Integers, extras: Integers, shards: int, width: int) -> tuple[Integers, Integers]:
    """Adds the copies that only some experts have: extras [E], each on hosts without that copy's units.

    Its shards stand on neighbors, as those of other copies do: where the fewest shards of that expert are, then the fewest experts.
    """
    held = np.bincount(places, minlength=width)
    neighbors = (np.arange(width)[:, None] + np.arange(shards)) % width  # [D, M]: the hosts of a copy whose first shard is on each
    more_units, more_places = [units], [places]
    for expert in np.flatnonzero(extras).tolist():
        firsts = places[units == expert * shards]
        near = np.bincount(neighbors[firsts].ravel(), minlength=width)
        for _ in range(extras[expert]):
            cost = near[neighbors].sum(axis=1) * (shards * held.max() + 1) + held[neighbors].sum(axis=1)
            cost[firsts] = np.iinfo(cost.dtype).max
            first = cost.argmin()
            firsts = np.append(firsts, first)
            near[neighbors[first]] += 1
            held[neighbors[first]] += 1
            more_units.append(np.arange(expert * shards, (expert + 1) * shards))
            more_places.append(neighbors[first])
    return np.concatenate(more_units), np.concatenate(more_places)
