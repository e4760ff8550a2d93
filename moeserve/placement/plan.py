"""The placement plan: pure functions from sizes and settings to a placement; no clock, no I/O.

E experts of a layer, M shards each, C copies, D hosts, S pipeline stages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from moeserve.config import MAX_PHYSICAL, LayerSpec, PlacementConfig
from moeserve.errors import ConfigError
from moeserve.placement.layer import Integers, LayerPlacement, Placement


def plan_placement(specs: Sequence[LayerSpec], config: PlacementConfig, epoch: int = 1) -> Placement:
    """Spread every layer's experts over the hosts of its stage as evenly as numbers allow.

    Copies of an expert, and shards of a copy, stand on different hosts. Raises ConfigError when that is impossible, or when a host would be
    left without any expert.
    """
    check_split(specs, config)
    num_hosts = _num_hosts(specs, config)
    _check_number(specs, config, num_hosts)
    stages = _stages(num_hosts, len(specs), config.pipeline_stages)
    copies = [copies_of(spec, config) for spec in specs]
    layers = []
    for number, spec in enumerate(specs):
        hosts = stages[number * config.pipeline_stages // len(specs)]
        _check_room(spec, int(copies[number].max()), hosts, config)
        layers.append(_plan_layer(number, copies[number], hosts, num_hosts, config))
    idle = set(range(num_hosts)) - {int(host) for layer in layers for host in layer.host_of_physical}
    if idle:
        raise ConfigError(
            f"placement.num_hosts is {num_hosts}, but no layer has enough experts for that many: {len(idle)} of them would have none"
        )
    return Placement(epoch, num_hosts, tuple(layers))


def check_split(specs: Sequence[LayerSpec], config: PlacementConfig) -> None:
    """Raises ConfigError if experts cannot be split as configured."""
    for spec in specs if config.tensor_parallel > 1 else ():
        if spec.module is not None:
            raise ConfigError(f"placement.tensor_parallel must be 1: the experts of layer {spec.name} are modules, which cannot be split")


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
            f"needs {needed} hosts for {largest} physical experts of a layer"
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


def _stages(num_hosts: int, num_layers: int, stages: int) -> list[range]:
    """Disjoint groups of hosts, one per stage: layers are placed on them in order (Huang et al. 2019, GPipe, arXiv 1811.06965)."""
    if stages > min(num_hosts, num_layers):
        raise ConfigError(
            f"placement.pipeline_stages is {stages}; allowed: at most the number of layers, {num_layers}, and of hosts, {num_hosts}"
        )
    return [range(stage * num_hosts // stages, (stage + 1) * num_hosts // stages) for stage in range(stages)]


def copies_of(spec: LayerSpec, config: PlacementConfig) -> Integers:
    """[E]: how many copies each expert of this layer gets."""
    wanted = config.copies.get(spec.name, config.copies.get("default", 1)) if isinstance(config.copies, dict) else config.copies
    if isinstance(wanted, int):
        return np.full(spec.num_hosted_experts, wanted)
    known = range(spec.num_hosted_experts)
    unknown = [key for key in wanted if key != "default" and not (re.fullmatch("[0-9]{1,6}", key) and int(key) in known)]
    if unknown:
        raise ConfigError(
            f"placement.copies names expert {unknown[0]!r} of layer {spec.name}; it has experts 0..{spec.num_hosted_experts - 1}"
        )
    copies = np.full(spec.num_hosted_experts, wanted.get("default", 1))
    for expert, number in wanted.items():
        if expert != "default":
            copies[int(expert)] = number
    return copies


def _check_room(spec: LayerSpec, copies: int, hosts: range, config: PlacementConfig) -> None:
    for key, number in (("copies", copies), ("tensor_parallel", config.tensor_parallel)):
        if number > len(hosts):
            raise ConfigError(
                f"placement.{key} is {number} for layer {spec.name}, which has {len(hosts)} hosts; allowed: at most one per host"
            )


def _plan_layer(layer: int, copies: Integers, hosts: range, num_hosts: int, config: PlacementConfig) -> LayerPlacement:
    """copies [E]. The strategy places the copies that every expert has; further ones go to the hosts with the fewest experts."""
    num_experts, shards, width = len(copies), config.tensor_parallel, len(hosts)
    experts = np.arange(num_experts)
    start = experts % width if config.strategy == "round_robin" else experts * width // num_experts
    # Each layer starts at another host, or the first ones would get every odd expert.
    start = start + layer
    everyone = int(copies.min())
    stride = shards if everyone * shards <= width else 1
    copy, shard = np.arange(everyone), np.arange(shards)
    place = (start[:, None, None] + shard[None, :, None] + stride * copy[None, None, :]) % width
    units = np.broadcast_to((experts[:, None] * shards + shard[None, :])[:, :, None], place.shape)
    unit_of, host_of = _with_extras(units.reshape(-1), place.reshape(-1), copies - everyone, shards, width)
    order = np.lexsort((unit_of, host_of))
    return LayerPlacement(num_hosts, unit_of[order], host_of[order] + hosts.start, shards)


def _with_extras(units: Integers, places: Integers, extras: Integers, shards: int, width: int) -> tuple[Integers, Integers]:
    """Adds the copies that only some experts have: extras [E], each on the host with the fewest experts among those without that unit."""
    if not extras.any():
        return units, places
    held = np.bincount(places, minlength=width)
    taken = {(int(unit), int(place)) for unit, place in zip(units, places, strict=True)}
    more: list[tuple[int, int]] = []
    for unit in np.repeat(np.arange(len(extras) * shards), np.repeat(extras, shards)).tolist():
        place = min((place for place in range(width) if (unit, place) not in taken), key=lambda place: (held[place], place))
        taken.add((unit, place))
        held[place] += 1
        more.append((unit, place))
    added = np.array(more)
    return np.concatenate([units, added[:, 0]]), np.concatenate([places, added[:, 1]])
