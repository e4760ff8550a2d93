"""The plan: which host holds which experts, from sizes, constraints and load, with as little change as pays. Pure and deterministic.

E experts of a layer, M shards each, U units, D hosts, S pipeline stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from moeserve.config import MAX_PHYSICAL
from moeserve.errors import ConfigError
from moeserve.placement.constraints import Constraints, Floats, HostLimits, LayerSize
from moeserve.placement.deal import Hands, check_apart, check_idle, check_stages, deal, layers_of_stage
from moeserve.placement.draft import LayerDraft
from moeserve.placement.exchange import improve
from moeserve.placement.layer import Integers, LayerPlacement, Placement
from moeserve.placement.room import Room
from moeserve.placement.spread import spread
from moeserve.placement.stages import hosts_of_stages
from moeserve.placement.task import LayerTask

#: rounds over all layers; each round makes a layer better by min_gain at least, so that they end
_MAX_ROUNDS: Final = 100


def plan(
    sizes: Sequence[LayerSize],
    constraints: Constraints,
    demand: Sequence[Floats | None] | None = None,
    previous: Placement | None = None,
) -> Placement:
    """The placement of all layers on the hosts of `constraints`.

    demand: for each layer the rows [E] of its experts, in any unit; None, or no rows at all = not known: then every copy counts the same,
    and none is added beyond least_copies.
    previous: what is in force. Hosts are the same if they have the same number. Experts of hosts that are gone are placed again, new hosts
    take their share from the busiest, and beyond that a layer changes only if the load of its busiest host falls by min_gain.
    If nothing changes, `previous` itself is returned; planned again with the same arguments, a plan is the identity.

    The hottest experts are replicated first (rows per copy), and the copies with the most rows go first to the least loaded host: longest
    processing time first, as in DeepSeek's EPLB; then exchanges relieve the busiest host.
    Raises ConfigError if an expert cannot be placed, saying which and why, or if a host would have none.
    """
    shards, stages = constraints.tensor_parallel, constraints.pipeline_stages
    check_stages(len(constraints.hosts), len(sizes), stages)
    _check_number(constraints)
    layers: list[LayerPlacement] = []
    num_hosts = constraints.hosts[-1].number + 1
    for stage, hosts in enumerate(hosts_of_stages(constraints, len(sizes), previous)):
        tasks = [
            _task(number, sizes[number], hosts, constraints, (None if demand is None else demand[number], previous))
            for number in layers_of_stage(stage, len(sizes), stages)
        ]
        for draft in _planned(tasks, hosts, constraints, previous):
            units, places = draft.physical()
            layers.append(LayerPlacement.of(num_hosts, units, draft.room.numbers[places], shards))
    if previous is not None and _is_same(previous.layers, layers):
        return previous
    placement = Placement(1 if previous is None else previous.epoch + 1, num_hosts, tuple(layers))
    _check_idle(constraints.hosts, placement)
    return placement


def _task(
    number: int, size: LayerSize, hosts: Sequence[HostLimits], constraints: Constraints, now: tuple[Floats | None, Placement | None]
) -> LayerTask:
    """now: rows and placement."""
    (rows, previous), shards = now, constraints.tensor_parallel
    least, num_experts = constraints.least_copies[number], len(size.unit_bytes) // shards
    check_apart(size.name, int(least.max()), shards, len(hosts))
    assert rows is None or (len(rows) == num_experts and np.isfinite(rows).all() and (rows >= 0).all()), "rows are counts"
    layer = None if previous is None or number >= len(previous.layers) else previous.layers[number]
    if layer is not None and (layer.num_experts != num_experts or layer.tensor_parallel != shards):
        layer = None
    # Shares of experts add up over the layers.
    logical = [sum(map(len, constraints.least_copies[:end])) for end in (number, number + 1)]
    start, end = (math.floor((1 + constraints.extra_copies) * each + 1e-9) for each in logical)
    return LayerTask(
        number=number,
        size=size,
        shards=shards,
        least=least,
        most=np.minimum(constraints.most_copies[number], len(hosts)),
        budget=max(end - start, int(least.sum())),
        most_held=MAX_PHYSICAL if constraints.experts_per_host is None else constraints.experts_per_host,
        rows=rows.astype(np.float64) if rows is not None and rows.sum() > 0 else None,
        placed=None if layer is None else _placed(layer, hosts),
        before=None if layer is None else (layer.copies >= 0).sum(axis=1).reshape(-1, shards).max(axis=1),
    )


def _placed(layer: LayerPlacement, hosts: Sequence[HostLimits]) -> tuple[Integers, Integers]:
    """What of the layer is on these hosts, numbered here by their order."""
    numbers = np.array([host.number for host in hosts])
    index = np.searchsorted(numbers, layer.host_of_physical).clip(max=len(numbers) - 1)
    stays = numbers[index] == layer.host_of_physical
    return layer.unit_of_physical[stays], index[stays]


def _planned(tasks: list[LayerTask], hosts: Sequence[HostLimits], constraints: Constraints, previous: Placement | None) -> list[LayerDraft]:
    """The layers of one stage."""
    drafts = _first_that_fits(tasks, hosts, constraints)
    before = set() if previous is None else set(previous.hosts)
    is_new = np.array([previous is not None and host.number not in before for host in hosts])
    for task, draft in zip(tasks, drafts, strict=True):
        if task.placed is None:
            improve(draft)
    if is_new.any() and not is_new.all():
        spread(drafts, is_new)
    for _ in range(_MAX_ROUNDS):
        better = [task.rebalanced(draft, constraints.min_gain) for task, draft in zip(tasks, drafts, strict=True)]
        if not any(better):
            break
        drafts = [new or old for new, old in zip(better, drafts, strict=True)]
    return drafts


def _first_that_fits(tasks: list[LayerTask], hosts: Sequence[HostLimits], constraints: Constraints) -> list[LayerDraft]:
    """Keeps what is placed. If an expert has no room then, copies beyond the least go; if that is not enough, all is placed afresh."""
    if (drafts := _dealt(tasks, hosts, constraints)) is not None:
        return drafts
    for keeps, by_room in ((True, False), (True, True), (False, True)):
        room = Room(hosts)
        drafts = [task.draft(room) for task in tasks]
        for task, draft in zip(tasks, drafts, strict=True):
            if keeps:
                task.keep(draft)
            if by_room:
                task.drop(draft, task.least)
        try:
            for index in sorted(range(len(tasks)), key=lambda index: -int(tasks[index].size.unit_bytes.max()) if by_room else 0):
                task = tasks[index]
                task.fill(drafts[index], task.least if by_room else task.copies(), by_room)
        except ConfigError:
            if not keeps:
                raise
        else:
            return drafts
    raise AssertionError("the last try raises")


def _dealt(tasks: list[LayerTask], hosts: Sequence[HostLimits], constraints: Constraints) -> list[LayerDraft] | None:
    """All layers as `deal` says, if there is nothing to keep, no load to follow, no nodes to spread copies over, and they fit."""
    room = Room(hosts)
    drafts = [task.draft(room) for task in tasks]
    for task, draft in zip(tasks, drafts, strict=True):
        if task.placed is not None or task.rows is not None or (room.num_nodes > 1 and task.least.max() > 1):
            return None
        units, places = deal(task.number, task.least, Hands(len(hosts), task.shards, constraints.strategy))
        draft.hold(units, places)
        draft.weigh(None, task.least)
        if (draft.count > draft.most_held).any():
            return None
    return drafts if (room.used <= room.memory).all() else None


def _check_number(constraints: Constraints) -> None:
    """Checked before arrays with an entry for each are allocated."""
    physical = sum(int(copies.sum()) for copies in constraints.least_copies) * constraints.tensor_parallel
    if physical > MAX_PHYSICAL:
        raise ConfigError(
            f"placement.copies and placement.tensor_parallel make {physical} physical experts; allowed: at most {MAX_PHYSICAL}"
        )


def _check_idle(hosts: Sequence[HostLimits], placement: Placement) -> None:
    occupied = set(placement.hosts)
    idle = [host for host in hosts if host.number not in occupied]
    has_enough = sum(len(layer.unit_of_physical) for layer in placement.layers) >= len(hosts)
    if idle and has_enough and idle[0].memory_bytes is not None:
        raise ConfigError(f"host {idle[0].number} would hold no expert: none fits into the {idle[0].memory_bytes} bytes that it may hold")
    check_idle(len(hosts), len(idle))


def _is_same(before: Sequence[LayerPlacement], after: Sequence[LayerPlacement]) -> bool:
    return len(before) == len(after) and all(
        np.array_equal(old.unit_of_physical, new.unit_of_physical) and np.array_equal(old.host_of_physical, new.host_of_physical)
        for old, new in zip(before, after, strict=True)
    )
