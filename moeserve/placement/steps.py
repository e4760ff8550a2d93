"""A change of placement in steps that read few bytes each. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moeserve.placement.constraints import LayerSize
from moeserve.placement.layer import Integers, LayerPlacement, Placement
from moeserve.placement.transition import Change

#: of units and hosts; None stands for the source of a further copy
_Pairs = set[tuple[int, int | None]]


@dataclass(frozen=True)
class Move:
    """A copy of a unit for `target`, instead of the one on `source`; None = one more."""

    layer: int
    unit: int
    source: int | None
    target: int
    nbytes: int


def steps(
    sizes: Sequence[LayerSize], before: Placement, after: Placement, max_moved_bytes: int | None, max_host_bytes: int | None = None
) -> list[Placement]:
    """The placements that lead from `before` to `after`, the last of which it is; empty if they are the same.

    For each one, hosts read at most max_moved_bytes, or one expert if that is larger. Copies that only leave, leave in the first. Layer
    by layer, and in turn host by host, so that no host gets many experts before it gives some away. A host that would hold more than
    max_host_bytes gets an expert later, when it has given others away; if that can never be, it gets it all the same. In every step each
    expert has at least as many copies as before or after, whichever are fewer. What is on hosts that are gone moves step by step as well:
    if they are dead rather than drained, take one step.
    """
    changes = [Change.of(old, new) for old, new in zip(before.layers, after.layers, strict=True)]
    if not any(change.arrivals.size or change.departures.size for change in changes):
        return []
    moves = [move for number, change in enumerate(changes) for move in _moves(number, sizes[number], change)]
    num_hosts = max(before.num_hosts, after.num_hosts)
    rounds = list(_rounds(moves, max_moved_bytes, max_host_bytes, _bytes_of_hosts(sizes, before, num_hosts)))
    held = [_without_surplus(layer, change) for layer, change in zip(before.layers, changes, strict=True)]
    layers = [_layer(pairs, num_hosts, layer.tensor_parallel) for pairs, layer in zip(held, before.layers, strict=True)]
    made = []
    for number, moved in enumerate(rounds[:-1], 1):
        for move in moved:
            held[move.layer].discard((move.unit, move.source))
            held[move.layer].add((move.unit, move.target))
        for layer in {move.layer for move in moved}:
            layers[layer] = _layer(held[layer], num_hosts, layers[layer].tensor_parallel)
        made.append(Placement(before.epoch + number, num_hosts, tuple(layers)))
    return [*made, after]


def _moves(layer: int, size: LayerSize, change: Change) -> list[Move]:
    """Every arrival, with a departure of the same unit if there is one; the first of each host, then the second of each."""
    left = _by_unit(change.departures)
    rank: dict[int, int] = defaultdict(int)
    moves = []
    for unit, target in change.arrivals.T.tolist():
        source = left[unit].pop(0) if left[unit] else None
        moves.append((rank[target], Move(layer, unit, source, target, int(size.unit_bytes[unit]))))
        rank[target] += 1
    return [move for _, move in sorted(moves, key=lambda each: each[0])]


def _without_surplus(layer: LayerPlacement, change: Change) -> _Pairs:
    """Pairs of units and hosts as before, but for copies that leave without another in their place."""
    left = _by_unit(change.departures)
    for unit in change.arrivals[0].tolist():
        del left[unit][:1]
    surplus = {(unit, host) for unit, hosts in left.items() for host in hosts}
    return set(zip(layer.unit_of_physical.tolist(), layer.host_of_physical.tolist(), strict=True)) - surplus


def _by_unit(pairs: Integers) -> dict[int, list[int]]:
    hosts: dict[int, list[int]] = defaultdict(list)
    for unit, host in pairs.T.tolist():
        hosts[unit].append(host)
    return hosts


def _rounds(moves: Sequence[Move], max_moved_bytes: int | None, max_host_bytes: int | None, host_bytes: Integers) -> Iterator[list[Move]]:
    """`host_bytes`: of each host, what it holds before; surplus copies are not taken from it."""
    left = list(moves)
    while True:
        begun, left = _round(left, max_moved_bytes, max_host_bytes, host_bytes.copy())
        yield begun
        if not left:
            return
        for move in begun:
            host_bytes[move.target] += move.nbytes
            if move.source is not None:
                host_bytes[move.source] -= move.nbytes


def _round(
    moves: Sequence[Move], max_moved_bytes: int | None, max_host_bytes: int | None, host_bytes: Integers
) -> tuple[list[Move], list[Move]]:
    """What can be moved at once, and what is left."""
    begun: list[Move] = []
    later: list[Move] = []
    nbytes = 0
    for number, move in enumerate(moves):
        if begun and max_moved_bytes is not None and nbytes + move.nbytes > max_moved_bytes:
            return begun, [*later, *moves[number:]]
        if max_host_bytes is not None and host_bytes[move.target] + move.nbytes > max_host_bytes:
            later.append(move)
            continue
        begun.append(move)
        nbytes += move.nbytes
        host_bytes[move.target] += move.nbytes
    return (begun, later) if begun else (later[:1], later[1:])


def _bytes_of_hosts(sizes: Sequence[LayerSize], placement: Placement, num_hosts: int) -> Integers:
    """[num_hosts]: of all experts; shared ones are there in any case."""
    nbytes = np.zeros(num_hosts, dtype=np.int64)
    for size, layer in zip(sizes, placement.layers, strict=True):
        np.add.at(nbytes, layer.host_of_physical, size.unit_bytes[layer.unit_of_physical])
    return nbytes


def _layer(pairs: _Pairs, num_hosts: int, shards: int) -> LayerPlacement:
    units, hosts = np.array(sorted(pairs)).T
    return LayerPlacement.of(num_hosts, units, hosts, shards)
