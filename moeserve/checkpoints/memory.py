"""How many bytes of weights every host will hold, and whether there is room for them: known before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from moeserve.checkpoints.memory_group import MemoryGroup
from moeserve.checkpoints.source import LayerSource, bank_bytes
from moeserve.config import PlacementConfig, StoreConfig
from moeserve.errors import ConfigError, number_of
from moeserve.experts import ExpertShard
from moeserve.observe.stats import host_name
from moeserve.placement import LayerSize, Placement

#: beside weights, what a process with torch takes
_BYTES_BESIDE = 2**28
#: less reads as none in GiB
_LEAST_GIB = 2**30 // 100


def host_bytes(sources: Sequence[LayerSource], placement: Placement) -> list[int]:
    """The bytes of all its experts, of every host by its number; 0 for numbers without a host."""
    nbytes = [0] * placement.num_hosts
    for source, layer in zip(sources, placement.layers, strict=True):
        for host, shards in layer.by_host():
            nbytes[host] += bank_bytes(source, shards)
    return nbytes


def layer_size(source: LayerSource, tensor_parallel: int = 1) -> LayerSize:
    """The bytes of every shard of a layer, for the planner: known without reading them."""
    spec = source.spec
    shards = (ExpertShard(expert, part, tensor_parallel) for expert in range(spec.num_hosted_experts) for part in range(tensor_parallel))
    return LayerSize(spec.name, np.array([source.nbytes(shard) for shard in shards], dtype=np.int64), source.shared_nbytes())


def in_memory(nbytes: Sequence[int], sources: Sequence[LayerSource], placing: PlacementConfig, store: StoreConfig) -> list[int]:
    """What is in the memory of hosts whose experts have so many bytes: all of it, or, with store.spill, as much as there is room for.

    Raises ConfigError when there is no room for one of the experts that are read when rows need them.
    """
    limit = placing.memory_per_host_bytes
    if store.spill is None or limit is None:
        return list(nbytes)
    for source in sources:
        size = layer_size(source, placing.tensor_parallel)
        largest = max(int(size.unit_bytes.max()), size.shared_bytes)
        if largest > limit:
            raise ConfigError(
                f"placement.memory_per_host_bytes is {limit}, but an expert of layer {source.spec.name} has {largest} bytes; "
                f"allowed with store.spill: at least the bytes of the largest expert"
            )
    return [min(each, limit) for each in nbytes]


def check_memory(nbytes: Sequence[int], placing: PlacementConfig, machine_bytes: int | None) -> None:
    """`nbytes` in the memory of every host; `machine_bytes` is what this machine has, where all hosts without a GPU are in its memory.

    Raises ConfigError when weights do not fit.
    """
    limit = placing.memory_per_host_bytes
    largest = max(range(len(nbytes)), key=lambda host: nbytes[host])
    if limit is not None and nbytes[largest] > limit:
        raise ConfigError(
            f"{host_name(largest)} would hold {_gib(nbytes[largest])} of weights, "
            f"but placement.memory_per_host_bytes allows {_gib(limit)}: "
            "use more hosts, fewer copies, a smaller model.dtype or model.quantization, or store.spill"
        )
    if machine_bytes is not None and not placing.gpus_per_host and sum(nbytes) > machine_bytes:
        raise ConfigError(
            f"{number_of(len(nbytes), 'host')} would hold {_gib(sum(nbytes))} of weights, "
            f"but this machine has {_gib(machine_bytes)} of memory, or its container has: "
            "join a cluster with ray.address, serve fewer model.layers, or use a smaller model.dtype or model.quantization"
        )


def check_change(nbytes: Mapping[int, int], placing: PlacementConfig, machine_bytes: int | None) -> None:
    """`nbytes` of each host, by number, while it has the weights of two releases; otherwise as `check_memory`."""
    if not nbytes:
        return
    limit, largest = placing.memory_per_host_bytes, max(nbytes, key=lambda host: nbytes[host])
    if limit is not None and nbytes[largest] > limit:
        raise ConfigError(
            f"{host_name(largest)} would hold {_gib(nbytes[largest])} of weights while this change happens, "
            f"but placement.memory_per_host_bytes allows {_gib(limit)}: change fewer layers or hosts at a time, or use more hosts"
        )
    if machine_bytes is not None and not placing.gpus_per_host and sum(nbytes.values()) > machine_bytes:
        raise ConfigError(
            f"{number_of(len(nbytes), 'host')} would hold {_gib(sum(nbytes.values()))} of weights while this change happens, "
            f"but this machine has {_gib(machine_bytes)} of memory, or its container has: change fewer layers or hosts at a time"
        )


def memory_bytes() -> int:
    """What this machine, or the memory control group (a container's, for example) this runs in, has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = MemoryGroup().limit_bytes
    return physical if limit is None else min(physical, limit)


def memory_warning(nbytes: Sequence[int]) -> str:
    """What to say of hosts with so many bytes of weights each that start in the memory of this machine, as it is now; "" = nothing."""
    needed, free = sum(nbytes) + len(nbytes) * _BYTES_BESIDE, _free_bytes()
    if needed <= free:
        return ""
    hosts = "1 host takes" if len(nbytes) == 1 else f"{len(nbytes)} hosts take"
    return (
        f"{hosts} about {_gib(needed)} of memory, {_gib(sum(nbytes))} of it for weights, and {_gib(free)} are free here: "
        "they may be killed while they load"
    )


def _free_bytes() -> int:
    with open("/proc/meminfo") as meminfo:
        free = next(1024 * int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable:"))
    below_limits = MemoryGroup().free_bytes
    return free if below_limits is None else min(free, below_limits)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= _LEAST_GIB else f"{nbytes} bytes"
