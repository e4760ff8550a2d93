"""How many bytes of weights every host will hold, and whether there is room for them: known before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from moeserve.checkpoints.source import LayerSource, bank_bytes
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError
from moeserve.placement import Placement

#: of a container, in cgroup v2
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_bytes(sources: Sequence[LayerSource], placement: Placement) -> list[int]:
    """For every host, the bytes of all its experts."""
    nbytes = [0] * placement.num_hosts
    for source, layer in zip(sources, placement.layers, strict=True):
        for host, shards in layer.by_host():
            nbytes[host] += bank_bytes(source, shards)
    return nbytes


def check_memory(nbytes: Sequence[int], config: ServiceConfig, machine_bytes: int) -> None:
    """`nbytes` of every host; `machine_bytes` is what this machine has, which counts for hosts that a local Ray keeps in its memory.

    Raises ConfigError when weights do not fit.
    """
    limit = config.placement.memory_per_host_bytes
    largest = max(range(len(nbytes)), key=lambda host: nbytes[host])
    if limit is not None and nbytes[largest] > limit:
        raise ConfigError(
            f"host-{largest} would hold {_gib(nbytes[largest])} of weights, but placement.memory_per_host_bytes allows {_gib(limit)}: "
            "use more hosts, fewer copies, or a smaller model.dtype or model.quantization"
        )
    if config.ray.address is None and not config.placement.gpus_per_host and sum(nbytes) > machine_bytes:
        raise ConfigError(
            f"{len(nbytes)} hosts would hold {_gib(sum(nbytes))} of weights, but this machine has {_gib(machine_bytes)} of memory: "
            "join a cluster with ray.address, serve fewer model.layers, or use a smaller model.dtype or model.quantization"
        )


def memory_bytes() -> int:
    """What this machine, or the container this runs in, has."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return physical if limit == "max" else min(physical, int(limit))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
