"""Which hosts are in which pipeline stage; a host stays in its stage where numbers allow."""

from __future__ import annotations

from collections.abc import Sequence

from moeserve.placement.constraints import Constraints, HostLimits
from moeserve.placement.deal import layers_of_stage, stage_bounds
from moeserve.placement.layer import Placement


def hosts_of_stages(constraints: Constraints, num_layers: int, previous: Placement | None) -> list[tuple[HostLimits, ...]]:
    """Disjoint groups of hosts, as even as numbers allow, ascending in each. Those without a stage fill what is missing, in order."""
    hosts, stages = constraints.hosts, constraints.pipeline_stages
    if stages == 1:
        return [hosts]
    before = {} if previous is None or len(previous.layers) != num_layers else _stages_before(previous, stages)
    kept = [[host for host in hosts if before.get(host.number) == stage] for stage in range(stages)]
    widths = [end - start for start, end in (stage_bounds(stage, len(hosts), stages) for stage in range(stages))]
    if before:
        widths = _fitted(widths, [len(each) for each in kept])
    kept = [each[:width] for each, width in zip(kept, widths, strict=True)]
    taken = {host.number for each in kept for host in each}
    free = iter([host for host in hosts if host.number not in taken])
    filled = [[*each, *(next(free) for _ in range(width - len(each)))] for each, width in zip(kept, widths, strict=True)]
    return [tuple(sorted(each, key=lambda host: host.number)) for each in filled]


def _stages_before(previous: Placement, stages: int) -> dict[int, int]:
    return {
        int(host): stage
        for stage in range(stages)
        for layer in layers_of_stage(stage, len(previous.layers), stages)
        for host in previous.layers[layer].host_of_physical
    }


def _fitted(widths: Sequence[int], kept: Sequence[int]) -> list[int]:
    """The same widths, the larger for the stages that have kept more hosts, so that fewer change their stage."""
    fitted = [0] * len(widths)
    for width, stage in zip(sorted(widths), sorted(range(len(kept)), key=lambda stage: kept[stage]), strict=True):
        fitted[stage] = width
    return fitted
